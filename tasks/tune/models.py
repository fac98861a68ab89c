"""Adapted models as `tune` keeps them: which there are, read again, and what they make of images and texts."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from latteflow.models.methods.registry import METHODS
from latteflow.models.towers import clip
from latteflow.storage.artifacts import Artifact
from latteflow.storage.errors import DataError
from latteflow.storage.shards import read_index, read_records
from latteflow.storage.tables import read_safetensors
from latteflow.tasks.core.decode import pixel_batches
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.features import Features, centred
from latteflow.tasks.core.stage import StageResult, open_store

ADAPTER = ".adapter.safetensors"
"""Ending of the file of a text tower that is no CLIP's, behind the name of its part."""


@dataclass(frozen=True)
class Tuned:
    """One adapted model, as the difference to the CLIP it came from.

    Attributes:
        prototypes: the classifier, unit rows ``(classes, dim)``.
        centre: subtracted from image embeddings, ``(dim,)``; zeros without centring.
        image_map, text_map: ``(dim, dim)`` on the right of the towers' embeddings, or None.
        assignments: soft classes of the images it was adapted to, ``(n, classes)``, in the order of their features;
            None of a method that knows them no better than other images.
        towers: tensors of the CLIP that training changed, by name; empty where the towers are as they were.
        scale: exp(logit_scale) of the CLIP, which stays that of the classifier whatever scale the loss had (4.10).
    """

    prototypes: np.ndarray
    centre: np.ndarray
    image_map: np.ndarray | None
    text_map: np.ndarray | None
    assignments: np.ndarray | None
    towers: Mapping[str, np.ndarray]
    scale: float


def part_name(method: str, seed: int | None) -> str:
    """Of a part, and of its files up to the suffix."""
    return method if seed is None or not METHODS[method].is_seeded else f"{method}.seed-{seed}"


def read_tuned(artifact: Artifact, method: str, seed: int | None) -> Tuned:
    """One adapted model of a `tune` artifact."""
    return tuned_from(artifact.read(f"{part_name(method, seed)}.safetensors"))


def tuned_from(data: bytes) -> Tuned:
    """An adapted model from the bytes of its file."""
    found = read_safetensors(data)
    return Tuned(
        prototypes=found["prototypes"],
        centre=found["centre"],
        image_map=found.get("image_map"),
        text_map=found.get("text_map"),
        assignments=found.get("assignments"),
        towers={name.removeprefix("tower."): found[name] for name in found if name.startswith("tower.")},
        scale=float(found["scale"][0]),
    )


def read_history(artifact: Artifact, method: str, seed: int | None) -> list[dict[str, float]]:
    """One record for each epoch of a model of a `tune` artifact; none for a method that has no epochs."""
    records: list[dict[str, float]] = json.loads(artifact.read(f"{part_name(method, seed)}.history.json"))
    return records


def tuned_features(domain: Domain, tuned: Tuned, images: Artifact, found: Features) -> np.ndarray:
    """Unit image features of the adapted model, ``(n, dim)``, in the order of ``found``.

    Args:
        images: the shards that ``found`` was made of; read only where the image tower itself was trained.
    """
    from latteflow.models.towers.blocks import IMAGE_TOWERS

    embeds = found.embeds
    if any(name.startswith(IMAGE_TOWERS) for name in tuned.towers):
        model = tuned_clip(domain, tuned)
        index = read_index(images).filter(pl.col("key").is_in(found.keys))
        records = read_records(images, index)
        batches = pixel_batches(records, model.preprocess, batch=domain.embed.batch)
        embeds = np.concatenate([model.image_embeds(pixels).numpy() for _, pixels in batches])
    if tuned.image_map is None:
        return centred(embeds, tuned.centre)
    return centred((embeds - tuned.centre) @ tuned.image_map, np.zeros_like(tuned.centre))


def tuned_clip(domain: Domain, tuned: Tuned) -> clip.Clip:
    """The domain's CLIP with the trained tensors in place (maps are not folded in)."""
    import torch

    model = clip.load(domain.clip)
    if not tuned.towers:
        return model
    own = copy.deepcopy(model.model)
    own.load_state_dict({name: torch.from_numpy(array) for name, array in tuned.towers.items()}, strict=False)
    return replace(model, model=own)


def chosen_model(
    domain: Domain, tuned: StageResult, seed: int | None, method: str | None
) -> tuple[str, int | None, Tuned]:
    """The adapted model that somebody means, with its method and seed.

    Args:
        seed, method: which; by default the domain's first.

    Raises:
        DataError: the domain has no such model.
    """
    chosen, number = check_model(domain, seed, method)
    return chosen, number, read_tuned(open_store(domain).open(tuned.ref), chosen, number)


def check_model(domain: Domain, seed: int | None, method: str | None) -> tuple[str, int | None]:
    """Method and seed of the adapted model that somebody means, before anything is read; see :func:`chosen_model`.

    Raises:
        DataError: the domain has no such model.
    """
    chosen = next((each for each in domain.method if method in (None, each)), None)
    if chosen is None:
        raise DataError(
            f"there is no model by {method!r}; `method` is {', '.join(domain.method)}, and zero_shot is the model as "
            "it came"
        )
    seeds = domain.seeds_of(chosen)
    if seed not in (None, *seeds):
        have = f"`seeds` are {', '.join(map(str, seeds))}" if None not in seeds else f"{chosen} has one model, no seeds"
        raise DataError(f"there is no model with seed {seed}; {have}")
    return chosen, seeds[0] if seed is None else seed


def text_reader(domain: Domain, tuned: Tuned) -> clip.Clip:
    """The domain's CLIP with the text tower of the adapted model, text map and all."""
    import torch

    from latteflow.models.ship.export import fold

    found = tuned_clip(domain, tuned)
    if tuned.text_map is None:
        return found
    model = copy.deepcopy(found.model)
    fold(model, "text", torch.from_numpy(tuned.text_map).to(found.device))
    return replace(found, model=model)
