"""How long the prompts of a stage will be, before any was asked: by the model's own processor and the images' sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import chain, cycle, islice

import numpy as np

from latteflow.models.settings import LanguageModelSettings
from latteflow.models.texts.collage import SIDE_PX
from latteflow.models.texts.describers.tokens import Shown, prompt_tokens, shown_size
from latteflow.models.texts.prompts import fill
from latteflow.storage.artifacts import ArtifactStore
from latteflow.storage.images import ImageRejected, open_image
from latteflow.storage.shards import newest, read_index
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.ingest.shard import open_source

LOOKED_AT = 8
"""Images whose sizes stand for those of all."""


def mean_prompt_tokens(store: ArtifactStore, domain: Domain, stage: str) -> float | None:
    """Of the prompts about images (``describe``) or groups of them (``group``).

    Returns:
        None where the describer's processor is not on this machine, and for texts about pairs, which are of texts.
    """
    pack = domain.prompt_pack
    if pack is None or not isinstance(domain.describer, LanguageModelSettings) or stage not in ("describe", "group"):
        return None
    asked = [fill(each, **{"class": domain.classes[0]}) for each in (pack.image if stage == "describe" else pack.group)]
    sizes = [shown_size(size, domain.describer.longest_px) for size in _sizes(store, domain)]
    if not sizes:
        return None
    prompts: list[Shown]
    if stage == "describe":
        prompts = [(question, [size]) for question in asked for size in sizes]
    else:
        several = list(islice(cycle(sizes), domain.group.size))
        view = [(SIDE_PX, SIDE_PX)] if domain.group.view == "collage" else several
        prompts = [(question, view) for question in asked]
    return prompt_tokens(domain.describer, prompts)


def _sizes(store: ArtifactStore, domain: Domain) -> list[tuple[int, int]]:
    """Width and height of some images: from the shards, and where there are none of the first of the source."""
    shards = newest(store, domain.name, "train")
    if shards is None:
        return list(islice(_of_source(domain), LOOKED_AT))
    index = read_index(shards).select("width", "height")
    rows = np.unique(np.linspace(0, index.height - 1, min(LOOKED_AT, index.height)).astype(np.int64))
    return [index.row(int(row)) for row in rows]


def _of_source(domain: Domain) -> Iterator[tuple[int, int]]:
    source = open_source(domain, "train")
    whole = (source.members(each) if each.container and each.place < 0 else [each] for each in source.scan())
    for entry in islice(chain.from_iterable(whole), 2 * LOOKED_AT):
        with contextlib.suppress(ImageRejected, OSError, SyntaxError, ValueError):  # a broken image says nothing
            yield open_image(source.read(entry)).size
