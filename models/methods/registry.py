"""Every way to adapt to a domain, by the name it has in a domain file."""

from __future__ import annotations

from typing import Any

from torch import nn

from models.methods.adaptation import Adapted, TuneData
from models.methods.baselines import flyp, self_training, wise_ft
from models.methods.latteclip import tune
from models.methods.pc_clip import tune_pairs
from models.methods.plus import tune_plus
from models.methods.transduction import transduce
from models.settings import LatteClipSettings, Method, PcClipSettings, TrainingSettings, TransductionSettings


def adapt(
    method: Method,
    data: TuneData,
    latteclip: LatteClipSettings,
    transduction: TransductionSettings,
    training: TrainingSettings | None = None,
    *,
    pc_clip: PcClipSettings | None = None,
    seed: int = 0,
    clip: nn.Module | None = None,
    scale: float = 100.0,
    **options: Any,
) -> Adapted:
    """Adapt by one of the methods; arguments as for :func:`models.methods.latteclip.tune`.

    Transduction has no randomness and does not look at ``seed``, nor, as nothing is trained, at ``latteclip``; class
    descriptions are zero-shot with other class texts. CLAMP reads texts, not their features, and is not one of these:
    see :mod:`models.methods.clamp`.
    """
    if method == "transduction":
        found = transduce(transduction, data.image_features, data.class_features, scale)
        return Adapted(prototypes=found.prototypes, scale=scale, assignments=found.assignments)
    if method == "class_descriptions":
        return Adapted(prototypes=data.class_features, scale=scale)
    options |= {"seed": seed, "scale": scale}
    if method == "pc_clip":
        return tune_pairs(pc_clip or PcClipSettings(), data, training, clip=clip, **options)
    if method == "latteclip_plus":
        return tune_plus(latteclip, transduction, data, training, **options)
    if method == "self_training":
        return self_training(latteclip, data, training, **options)
    trained = {"latteclip": tune, "flyp": flyp, "wise_ft": wise_ft}[method]
    return trained(latteclip, data, training, clip=clip, **options)
