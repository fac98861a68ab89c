"""latteclip_plus: transduction and LatteCLIP in turns, each starting from what the other found.

1. Transduction on the images, the class texts and what the images' own texts are worth
   (:mod:`~models.methods.latteclip_plus.beliefs`) gives each image a label.
2. LatteCLIP tunes with these labels in place of raw zero-shot's as the second pseudo-label.
3. Transduction again, on the tuned features, with LatteCLIP's prototypes in place of the class texts.

Texts of images and groups that are worth nothing are left out altogether: the model is then the one without texts.
Texts that were read off the features themselves have no say in 1 and 3: that they agree with them is no evidence.

The means and texts of the last transduction, added up, are the classifier: one unit row for each class behind
LatteCLIP's image map, as LatteCLIP's own, so whatever reads a LatteCLIP model reads this one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from latteflow.models.methods.adaptation import Adapted, TuneData
from latteflow.models.methods.latteclip import LatteClipSettings
from latteflow.models.methods.latteclip.tuning import tune
from latteflow.models.methods.latteclip_plus.beliefs import Beliefs, beliefs
from latteflow.models.methods.transduction import TransductionSettings
from latteflow.models.methods.transduction.tuning import nearest, transduce
from latteflow.models.rows import kept, through
from latteflow.models.settings import TrainingSettings
from latteflow.models.vectors import unit


def tune_plus(
    cfg: LatteClipSettings,
    transduction: TransductionSettings,
    data: TuneData,
    training: TrainingSettings | None = None,
    *,
    scale: float = 100.0,
    **options: Any,
) -> Adapted:
    """Adapt to the domain.

    Args:
        cfg: LatteCLIP's settings, with `train` projections or prototypes.
        transduction: of both transductions.
        data: the domain; its `pseudo_labels` are not used. Class texts must be embeds, and images cached.
        scale: `exp(logit_scale)` of the CLIP.
        options: as for `latteclip.tune`.

    Raises:
        ValueError: the towers are to be trained, or features are missing.
    """
    if cfg.trains_towers:
        raise ValueError(
            f"latteclip_plus works on cached features: it needs train='projections' or 'prototypes', got {cfg.train!r}"
        )
    moved, (weight, found) = kept(data.image_features), Beliefs(0.0, None)
    alike = None if data.near_features is None else nearest(data.near_features, transduction.neighbours)
    near = alike
    if cfg.use_image_texts and data.image_texts is not None:
        near = near or nearest(moved, transduction.neighbours)
        asked = data.class_features, data.image_texts, data.has_image_text
        weight, found = beliefs(moved, *asked, scale, near)
    if not weight:
        data = replace(data, image_texts=None, has_image_text=None, group_texts=None, group_classes=None)
    if not data.independent_texts:
        weight, found = 0.0, None
    first = transduce(transduction, moved, data.class_features, scale, found, near)
    labels = first.labels
    del first, near
    tuned = tune(cfg, replace(data, pseudo_labels=labels), training, scale=scale, **options)
    with torch.no_grad():
        map_ = tuned.image_map
        features = moved if map_ is None else through(moved, lambda rows: unit(rows @ map_))
        last = transduce(transduction, features, tuned.prototypes, scale, found, alike)
    return replace(tuned, prototypes=last.prototypes, assignments=last.assignments, text_weight=weight)
