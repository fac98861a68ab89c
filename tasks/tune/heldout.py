"""Images as a model sees them that has not learnt from them: what tells the scores of new images of the domain.

An adapted model knows the images it was adapted to by heart. So the domain's images are halved, one half is scored by
a model that was adapted, in the same way, to the other, and no image is scored by what saw it.
"""

from __future__ import annotations

import logging

import numpy as np

from latteflow.models.methods.latteclip import LatteClipSettings
from latteflow.models.methods.method import Method
from latteflow.storage.artifacts import Artifact
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.features import centred
from latteflow.tasks.core.stage import StageResult
from latteflow.tasks.tune.inputs import Inputs, Stages

log = logging.getLogger("latteflow.tasks")
ENOUGH = 500
"""Scores from which on one half says how low those of new images are: to a share of 1 %, give or take half a point."""


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


def held_out_scores(
    domain: Domain, method: Method, seed: int | None, images: Artifact, embedded: Artifact, screened: Artifact | None
) -> np.ndarray:
    """Scores (:func:`models.ship.predictor.scores`) of images by a model adapted to the other half.

    Of one half, as adapting takes its time; where that is fewer than :data:`ENOUGH`, of both.

    Args:
        method: one that :func:`why_not` has nothing against.
        images, embedded, screened: the artifacts that the model was adapted to; no texts where the method reads none.
    """
    import torch

    from latteflow.models.methods.method import Given
    from latteflow.models.ship.predictor import scores

    made = (images, embedded, screened or embedded)  # a method without texts never looks at the last
    inputs = Inputs(domain, Stages(*(StageResult.of(each.ref) for each in made)))
    data, towers = inputs.of(method), inputs.clip
    assert data.image_embeds is not None and data.centre is not None
    found = []
    for first in (0, 1) if len(data) < 2 * ENOUGH else (0,):
        log.info("export %s: adapting to half of the images, to score the other half", method.name)
        held, rest = (torch.arange(start, len(data), 2) for start in (first, 1 - first))
        half = data.take(rest).to(towers.device)
        given = Given(data=half, sections=domain.sections, training=domain.training, seed=seed or 0, scale=towers.scale)
        model = method.adapt(given)
        moved = (data.image_embeds[held] - data.centre).numpy()
        if model.image_map is not None:
            moved = moved @ model.image_map.cpu().numpy()
        features = centred(moved, np.zeros(moved.shape[1], np.float32))
        found.append(scores(features, model.prototypes.cpu().numpy(), towers.scale))
    return np.concatenate(found)
