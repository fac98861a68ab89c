"""latteclip_plus: transduction and LatteCLIP in turns, each starting from what the other found.

1. Transduction on the images and the class texts gives each image a label from texts, neighbours and class means.
2. LatteCLIP tunes with these labels in place of raw zero-shot's as the second pseudo-label: texts enter here.
3. Transduction again, on the tuned features, with LatteCLIP's prototypes in place of the class texts.

The means and texts of the last transduction, added up, are the classifier: one unit row for each class behind
LatteCLIP's image map, as LatteCLIP's own, so whatever reads a LatteCLIP model reads this one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from models.baselines import class_features
from models.latteclip import LatteClipResult, Stats, TuneData, tune, unit
from models.losses import at_least_float32
from models.settings import LatteClipSettings, TransductionSettings
from models.transduction import transduce


def tune_plus(
    cfg: LatteClipSettings,
    transduction: TransductionSettings,
    data: TuneData,
    *,
    seed: int = 0,
    scale: float = 100.0,
    on_epoch: Callable[[int, Stats], None] | None = None,
) -> LatteClipResult:
    """Adapt to the domain.

    Args:
        cfg: LatteCLIP's settings, with `train` projections or prototypes.
        transduction: of both transductions.
        data: the domain; its `pseudo_labels` are not used. Class texts must be embeds, and images cached.
        seed: of LatteCLIP.
        scale: `exp(logit_scale)` of the CLIP.
        on_epoch: as for `tune`.

    Raises:
        ValueError: the towers are to be trained, or features are missing.
    """
    if cfg.trains_towers or data.image_embeds is None or not data.class_texts.is_floating_point():
        raise ValueError(
            f"latteclip_plus works on cached features: it needs image_embeds, class texts as embeds, and train="
            f"'projections' or 'prototypes', got train={cfg.train!r}"
        )
    embeds = at_least_float32(data.image_embeds)
    moved = embeds if data.centre is None else embeds - data.centre
    first = transduce(transduction, unit(moved), class_features(data), scale)
    tuned = tune(cfg, replace(data, pseudo_labels=first.labels), seed=seed, scale=scale, on_epoch=on_epoch)
    with torch.no_grad():
        features = unit(moved if tuned.image_map is None else moved @ tuned.image_map)
        last = transduce(transduction, features, tuned.prototypes, scale)
    return replace(tuned, prototypes=last.prototypes, assignments=last.assignments)
