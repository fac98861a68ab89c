"""rank: images in the order of an attribute, by one projection and one sort (PC-CLIP 6.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from latteflow.models.methods.pc_clip.comparative import projections, ranking
from latteflow.models.settings import ZERO_SHOT
from latteflow.models.towers import clip
from latteflow.storage.errors import DataError
from latteflow.storage.shards import read_index, read_records
from latteflow.tasks.core.decode import opened
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.features import centred, read_features
from latteflow.tasks.core.stage import StageResult, open_store
from latteflow.tasks.report.html import html, picture_url, thumbnail
from latteflow.tasks.tune.models import chosen_model, text_reader, tuned_features

LONGEST = 500
"""Characters of an attribute; more is a mistake, and no CLIP reads it."""
SIDE_PX = 112


@dataclass(frozen=True)
class Ranked:
    """The images of a domain along a direction.

    Attributes:
        sentence: what the text tower read.
        method: who adapted the model; ``zero_shot`` for nobody.
        keys, paths: of all images, those first of which the sentence is truest.
        values: cosines of their features with the sentence's, ``(n,)``, falling.
    """

    sentence: str
    method: str
    keys: Sequence[str]
    paths: Sequence[str]
    values: np.ndarray


@dataclass(frozen=True)
class Place:
    """An image in the order; the picture is a data URL."""

    number: int
    path: str
    value: float
    picture: str


def sentence(attribute: str) -> str:
    """A text about a difference, as pc_clip is trained on: "larger" -> "The first image shows this, ...: larger.".

    Nothing is put before the attribute, so that it may be an adjective, a noun with or without one, or "with a hat".

    Raises:
        DataError: there is no attribute, or far too much of one.
    """
    text = " ".join(attribute.split())
    if not text:
        raise DataError('the attribute is empty; give some words, such as "larger" or "more red"')
    if len(text) > LONGEST:
        raise DataError(
            f"the attribute has {len(text):,} characters, at most {LONGEST} are read; give some words, such as "
            f'"larger", not {text[:40]!r}...'
        )
    if "first" in text.lower().split():
        return text
    return f"The first image shows this, while the second image does not: {text.rstrip('.')}."


def rank(
    domain: Domain,
    shards: StageResult,
    embedded: StageResult,
    tuned: StageResult,
    attribute: str,
    *,
    method: str | None = None,
    seed: int | None = None,
) -> Ranked:
    """Order the training images of a domain by an attribute.

    Args:
        attribute: some words, or a whole sentence about "the first image".
        method, seed: which adapted model; by default pc_clip, if there is one, else the first. ``zero_shot``: none.

    Raises:
        DataError: the attribute is empty or too long, or there is no such model.
    """
    text = sentence(attribute)
    store = open_store(domain)
    images, found = store.open(shards.ref), read_features(store.open(embedded.ref))
    if method == ZERO_SHOT:
        reader, name = clip.load(domain.clip), ZERO_SHOT
        features = centred(found.embeds, found.shift)
    else:
        compares = next((each.name for each in domain.methods if each.reads == "pairs"), None)
        preferred = compares if method is None else method
        name, _, model = chosen_model(domain, tuned, seed, preferred)
        reader, features = text_reader(domain, model), tuned_features(domain, model, images, found)
    if reader.too_long([text])[0]:
        raise DataError(f"the attribute {text[:60]!r}... is longer than the CLIP reads; use fewer words")
    direction = reader.text_features([text])[0]
    order = ranking(features, direction)
    paths = dict(read_index(images).select("key", "path").iter_rows())
    return Ranked(
        sentence=text,
        method=name,
        keys=[found.keys[row] for row in order],
        paths=[paths[found.keys[row]] for row in order],
        values=projections(features, direction)[order],
    )


def page_of(domain: Domain, shards: StageResult, ranked: Ranked, count: int) -> str:
    """One self-contained page: the images at both ends of the order, and at even steps between them."""
    n = len(ranked.keys)
    ends = {"Most": range(min(count, n)), "Least": range(max(0, n - count), n)}
    between = np.linspace(0, n - 1, min(count, n)).round().astype(int).tolist()
    places = {"Most": [*ends["Most"]], "From most to least": between, "Least": [*ends["Least"]]}
    wanted = {ranked.keys[place] for each in places.values() for place in each}
    images = open_store(domain).open(shards.ref)
    index = read_index(images).filter(pl.col("key").is_in(list(wanted)))
    pictures = {record.key: picture_url(thumbnail(opened(record), SIDE_PX)) for record in read_records(images, index)}
    rows = {
        title: [
            Place(place + 1, ranked.paths[place], float(ranked.values[place]), pictures[ranked.keys[place]])
            for place in each
        ]
        for title, each in places.items()
    }
    return html("rank.html.j2", domain=domain.name, ranked=ranked, rows=rows, count=n)


def write_page(domain: Domain, shards: StageResult, ranked: Ranked, count: int, path: Path | None) -> Path:
    """Write the page, by default to ``OUTPUT/<name>/rank.html``; returns where it is."""
    path = path or Path(domain.output) / domain.name / "rank.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page_of(domain, shards, ranked, count), encoding="utf-8")
    return path
