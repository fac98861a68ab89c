"""latteclip_plus: transduction and LatteCLIP in turns, each starting from what the other found (docs/methods.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from latteflow.models.methods.latteclip import LatteClipSettings
from latteflow.models.methods.method import Given, Method, Section
from latteflow.models.methods.transduction import TransductionSettings

if TYPE_CHECKING:
    from latteflow.models.methods.adaptation import Adapted


def _adapt(given: Given) -> Adapted:
    from latteflow.models.methods.latteclip_plus.tuning import tune_plus

    settings = given.of(LatteClipSettings), given.of(TransductionSettings)
    return tune_plus(*settings, given.data, given.training, **given.options)


METHOD = Method(
    name="latteclip_plus",
    label="LatteCLIP plus",
    how="LatteCLIP (Cao et al. 2025, arXiv 2410.08211) between two anchored transductions",
    adapt=_adapt,
    reads="texts",
    sections={"latteclip": Section(LatteClipSettings), "transduction": Section(TransductionSettings)},
    weighs_texts=True,
    works_on_features=True,
    streams=True,
)
