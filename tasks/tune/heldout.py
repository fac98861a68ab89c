"""Images as a model sees them that has not learnt from them: what tells the scores of new images of the domain.

An adapted model knows the images it was adapted to by heart. So the domain's images are halved, one half is scored by
a model that was adapted, in the same way, to the other, and no image is scored by what saw it.
"""

from __future__ import annotations

import logging

import numpy as np

from models.settings import READS_TEXTS, SEEDLESS, Method
from models.towers import clip
from storage.artifacts import Artifact
from tasks.core.domain import Domain
from tasks.core.features import centred
from tasks.core.stage import StageResult
from tasks.tune.tune import Trainer

log = logging.getLogger("latteflow.tasks")
ENOUGH = 500
"""Scores from which on one half says how low those of new images are: to a share of 1 %, give or take half a point."""
NOTHING_LEARNT: frozenset[Method] = frozenset({"class_descriptions"})
"""Methods whose classifier comes from texts alone: every image is as new to it as any other, as it is to zero-shot."""


def why_not(domain: Domain, method: Method) -> str:
    """Why a model cannot be adapted to halves in the time of an export; empty if it can."""
    if method in ("clamp", "pc_clip"):
        return f"{method} would have to train its text tower again"
    if method in READS_TEXTS and domain.latteclip.texts_from != "clip":
        return f"{domain.latteclip.texts_from} would have to train its text tower again"
    if method not in SEEDLESS and domain.latteclip.trains_towers:
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

    from models.methods.registry import adapt
    from models.ship.predictor import scores

    stages = (images, embedded, screened or embedded)  # a method without texts never looks at the last
    trainer = Trainer(domain, tuple(StageResult.of(each.ref) for each in stages))
    data, towers = trainer.data(method), clip.load(domain.clip)
    assert data.image_embeds is not None and data.centre is not None
    found = []
    for first in (0, 1) if len(data) < 2 * ENOUGH else (0,):
        log.info("export %s: adapting to half of the images, to score the other half", method)
        held, rest = (torch.arange(start, len(data), 2) for start in (first, 1 - first))
        model = adapt(
            method,
            data.take(rest).to(towers.device),
            domain.latteclip,
            domain.transduction,
            domain.training,
            seed=seed or 0,
            scale=towers.scale,
        )
        moved = (data.image_embeds[held] - data.centre).numpy()
        if model.image_map is not None:
            moved = moved @ model.image_map.cpu().numpy()
        features = centred(moved, np.zeros(moved.shape[1], np.float32))
        found.append(scores(features, model.prototypes.cpu().numpy(), towers.scale))
    return np.concatenate(found)
