"""Every way to adapt to a domain, by the name it has in a domain file."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from models.baselines import class_features, flyp, self_training
from models.latteclip import LatteClipResult, Stats, TuneData, tune, unit
from models.losses import at_least_float32
from models.plus import tune_plus
from models.settings import LatteClipSettings, Method, TransductionSettings
from models.transduction import transduce


def adapt(
    method: Method,
    data: TuneData,
    latteclip: LatteClipSettings,
    transduction: TransductionSettings,
    *,
    seed: int = 0,
    clip: nn.Module | None = None,
    scale: float = 100.0,
    on_epoch: Callable[[int, Stats], None] | None = None,
) -> LatteClipResult:
    """Adapt by one of the methods; arguments as for :func:`models.latteclip.tune`.

    Transduction has no randomness and does not look at ``seed``, nor, as nothing is trained, at ``latteclip``.
    """
    if method == "transduction":
        if data.image_embeds is None or not data.class_texts.is_floating_point():
            raise ValueError("transduction needs cached image_embeds and class texts as embeds")
        embeds = at_least_float32(data.image_embeds)
        features = unit(embeds if data.centre is None else embeds - data.centre)
        found = transduce(transduction, features, class_features(data), scale)
        return LatteClipResult(
            prototypes=found.prototypes, image_map=None, text_map=None, clip=None, scale=scale, history=[],
            assignments=found.assignments,
        )  # fmt: skip
    if method == "latteclip_plus":
        return tune_plus(latteclip, transduction, data, seed=seed, scale=scale, on_epoch=on_epoch)
    if method == "self_training":
        return self_training(latteclip, data, seed=seed, scale=scale, on_epoch=on_epoch)
    trained = flyp if method == "flyp" else tune
    return trained(latteclip, data, seed=seed, clip=clip, scale=scale, on_epoch=on_epoch)
