"""Models that have not seen some of the images of a domain; see :mod:`models.judge.halves`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from latteflow.models.methods.latteclip import LatteClipSettings
from latteflow.models.methods.method import Method
from latteflow.models.towers import clip
from latteflow.storage.artifacts import Artifact
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import StageResult
from latteflow.tasks.tune.inputs import Inputs, Stages

if TYPE_CHECKING:
    from latteflow.models.judge.halves import Half
    from latteflow.models.methods.adaptation import Adapted, TuneData

log = logging.getLogger("latteflow.tasks")


def why_not(domain: Domain, method: Method) -> str:
    """Why a model cannot be adapted to halves in the time of an export; empty if it can."""
    settings = domain.of(LatteClipSettings)
    if method.reads_for_others or method.reads in ("captions", "pairs"):
        return f"{method.name} would have to train its text tower again"
    if method.reads == "texts" and settings.texts_from != "clip":
        return f"{settings.texts_from} would have to train its text tower again"
    if method.trains_towers(domain.sections, domain.clip.model == "embedded"):
        return "the towers would have to be trained again"
    return ""


def halves_of(
    domain: Domain, method: Method, seed: int | None, images: Artifact, embedded: Artifact, screened: Artifact | None
) -> Iterator[Half]:
    """Halves of the domain's images, and models that were adapted to the others; rows are those of the features.

    Args:
        method: one that :func:`why_not` has nothing against.
        images, embedded, screened: the artifacts that the model was adapted to; no texts where the method reads none.
    """
    from latteflow.models.judge.halves import halves
    from latteflow.models.methods.method import Given

    made = (images, embedded, screened or embedded)  # a method without texts never looks at the last
    inputs = Inputs(domain, Stages(*(StageResult.of(each.ref) for each in made)))
    towers = inputs.clip

    def adapt(data: TuneData) -> Adapted:
        log.info("%s: adapting to half of the images, to ask about the other half", method.name)
        return method.adapt(
            Given(
                data=data.to(towers.device),
                sections=domain.sections,
                training=domain.training,
                seed=seed or 0,
                scale=towers.scale,
            )
        )

    return halves(inputs.of(method), adapt)


def held_out_scores(
    domain: Domain, method: Method, seed: int | None, images: Artifact, embedded: Artifact, screened: Artifact | None
) -> np.ndarray:
    """Scores (:func:`models.ship.predictor.scores`) of images by models adapted to others; see :func:`halves_of`."""
    from latteflow.models.ship.predictor import scores

    found = halves_of(domain, method, seed, images, embedded, screened)
    scale = clip.load(domain.clip).scale
    return np.concatenate([scores(half.features.numpy(), half.prototypes.numpy(), scale) for half in found])
