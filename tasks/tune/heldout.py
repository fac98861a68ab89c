"""Images as a model sees them that has not learnt from them, nor from their texts.

An adapted model knows the images it was adapted to by heart. So the domain's images are halved, and a model that was
adapted to one half, in the same way, is asked about the other: what scores new images have, and whether their texts,
which it has not read, vouch for it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from latteflow.models.methods.latteclip import LatteClipSettings
from latteflow.models.methods.method import Method
from latteflow.models.towers import clip
from latteflow.storage.artifacts import Artifact
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.features import centred
from latteflow.tasks.core.stage import StageResult
from latteflow.tasks.tune.inputs import Inputs, Stages

log = logging.getLogger("latteflow.tasks")
ENOUGH = 500
"""Scores from which on one half says how low those of new images are: to a share of 1 %, give or take half a point."""


@dataclass(frozen=True)
class Half:
    """Images, and a model that was adapted to the others.

    Attributes:
        keys: of the images, ``(m,)``.
        features: their unit features by the model, ``(m, dim)``.
        prototypes: its classifier, ``(classes, dim)``.
    """

    keys: list[str]
    features: np.ndarray
    prototypes: np.ndarray


def why_not(domain: Domain, method: Method) -> str:
    """Why a model cannot be adapted to halves in the time of an export; empty if it can."""
    settings = domain.of(LatteClipSettings)
    if method.reads_for_others:
        return f"{method.name} would have to train its text tower again"
    if method.reads == "texts" and settings.texts_from != "clip":
        return f"{settings.texts_from} would have to train its text tower again"
    if method.trains_towers(domain.sections, domain.clip.model == "embedded"):
        return "the towers would have to be trained again"
    return ""


def halves(
    domain: Domain, method: Method, seed: int | None, images: Artifact, embedded: Artifact, screened: Artifact | None
) -> Iterator[Half]:
    """One half of the images, as adapting takes its time; where that has fewer than :data:`ENOUGH`, then the other.

    Args:
        method: one that :func:`why_not` has nothing against.
        images, embedded, screened: the artifacts that the model was adapted to; no texts where the method reads none.
    """
    import torch

    from latteflow.models.methods.method import Given

    made = (images, embedded, screened or embedded)  # a method without texts never looks at the last
    inputs = Inputs(domain, Stages(*(StageResult.of(each.ref) for each in made)))
    data, towers = inputs.of(method), inputs.clip
    assert data.image_embeds is not None and data.centre is not None
    for first in (0, 1) if len(data) < 2 * ENOUGH else (0,):
        log.info("%s: adapting to half of the images, to ask about the other half", method.name)
        held, rest = (torch.arange(start, len(data), 2) for start in (first, 1 - first))
        half = data.take(rest).to(towers.device)
        given = Given(data=half, sections=domain.sections, training=domain.training, seed=seed or 0, scale=towers.scale)
        model = method.adapt(given)
        moved = (data.image_embeds[held] - data.centre).numpy()
        if model.image_map is not None:
            moved = moved @ model.image_map.cpu().numpy()
        features = centred(moved, np.zeros(moved.shape[1], np.float32))
        yield Half(inputs.keys[first::2], features, model.prototypes.cpu().numpy())


def held_out_scores(
    domain: Domain, method: Method, seed: int | None, images: Artifact, embedded: Artifact, screened: Artifact | None
) -> np.ndarray:
    """Scores (:func:`models.ship.predictor.scores`) of images by models adapted to others; see :func:`halves`."""
    from latteflow.models.ship.predictor import scores

    found = halves(domain, method, seed, images, embedded, screened)
    scale = clip.load(domain.clip).scale
    return np.concatenate([scores(half.features, half.prototypes, scale) for half in found])
