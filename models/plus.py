"""latteclip_plus: transduction and LatteCLIP in turns, each starting from what the other found.

1. Transduction on the images and the class texts gives each image a label from texts, neighbours and class means.
2. LatteCLIP tunes with these labels in place of raw zero-shot's as the second pseudo-label: texts enter here.
3. Transduction again, on the tuned features, with LatteCLIP's prototypes in place of the class texts.

The means and texts of the last transduction, added up, are the classifier: one unit row for each class behind
LatteCLIP's image map, as LatteCLIP's own, so whatever reads a LatteCLIP model reads this one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.baselines import class_features
from models.latteclip import Stats, TuneData, tune, unit
from models.losses import at_least_float32
from models.settings import LatteClipPlusSettings, LatteClipSettings
from models.transduction import transduce


@dataclass(frozen=True, kw_only=True)
class PlusResult:
    """What `tune_plus` returns, all of it detached.

    Args:
        prototypes: the classifier, unit rows, `(classes, dim)`.
        image_map: `(dim, dim)`, or None where LatteCLIP trains none; features are `unit((embed - centre) @ image_map)`.
        text_map: the same for texts, or None.
        assignments: soft classes of the domain's own images after the last transduction, `(n, classes)`.
        first_labels: of the first transduction, `(n,)`: those LatteCLIP was given in the first round.
        history: LatteCLIP's, of all rounds, with `round`.
    """

    prototypes: Tensor
    image_map: Tensor | None
    text_map: Tensor | None
    assignments: Tensor
    first_labels: Tensor
    history: list[Stats]


def tune_plus(
    cfg: LatteClipPlusSettings,
    latteclip: LatteClipSettings,
    data: TuneData,
    *,
    seed: int = 0,
    scale: float = 100.0,
    on_epoch: Callable[[int, Stats], None] | None = None,
) -> PlusResult:
    """Adapt to the domain.

    Args:
        cfg: transduction and the number of rounds.
        latteclip: LatteCLIP's settings, with `train` projections or prototypes.
        data: the domain; its `pseudo_labels` are not used. Class texts must be embeds, and images cached.
        seed: of LatteCLIP.
        scale: `exp(logit_scale)` of the CLIP.
        on_epoch: as for `tune`.

    Raises:
        ValueError: the towers are to be trained, or features are missing.
    """
    if latteclip.trains_towers or data.image_embeds is None or not data.class_texts.is_floating_point():
        raise ValueError(
            f"latteclip_plus works on cached features: it needs image_embeds, class texts as embeds, and train="
            f"'projections' or 'prototypes', got train={latteclip.train!r}"
        )
    embeds = at_least_float32(data.image_embeds)
    moved = embeds if data.centre is None else embeds - data.centre
    features, prototypes = unit(moved), class_features(data)
    found = transduce(cfg.transduction, features, prototypes, scale)
    first_labels, history = found.labels, []
    image_map = text_map = None
    for number in range(cfg.rounds):
        tuned = tune(latteclip, replace(data, pseudo_labels=found.labels), seed=seed, scale=scale, on_epoch=on_epoch)
        history += [{**entry, "round": number} for entry in tuned.history]
        image_map, text_map = tuned.image_map, tuned.text_map
        features = features if image_map is None else unit(moved @ image_map)
        with torch.no_grad():
            found = transduce(cfg.transduction, features, tuned.prototypes, scale)
    return PlusResult(
        prototypes=found.prototypes,
        image_map=image_map,
        text_map=text_map,
        assignments=found.assignments,
        first_labels=first_labels,
        history=history,
    )
