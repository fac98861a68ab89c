"""What LatteCLIP is compared with: FLYP, WiSE-FT, self-training, and zero-shot with descriptions of the classes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from latteflow.models.methods.latteclip import OF_TEXTS, LatteClipSettings, made_from, trains_towers
from latteflow.models.methods.method import Given, Method, Section

if TYPE_CHECKING:
    from latteflow.models.methods.adaptation import Adapted

_SECTIONS = {"latteclip": Section(LatteClipSettings, unread=OF_TEXTS)}


def _flyp(given: Given) -> Adapted:
    from latteflow.models.methods.baselines.tuning import flyp

    return flyp(given.of(LatteClipSettings), given.data, given.training, clip=given.clip, **given.options)


def _wise_ft(given: Given) -> Adapted:
    from latteflow.models.methods.baselines.tuning import wise_ft

    return wise_ft(given.of(LatteClipSettings), given.data, given.training, clip=given.clip, **given.options)


def _self_training(given: Given) -> Adapted:
    from latteflow.models.methods.baselines.tuning import self_training

    return self_training(given.of(LatteClipSettings), given.data, given.training, **given.options)


def _class_descriptions(given: Given) -> Adapted:
    from latteflow.models.methods.adaptation import Adapted

    return Adapted(prototypes=given.data.class_features, scale=given.scale)


_FLYP = Method(
    name="flyp",
    label="FLYP",
    how="FLYP (arXiv 2212.00638) on zero-shot pseudo-labels",
    adapt=_flyp,
    reads="sentences",
    sections=_SECTIONS,
    made_from=made_from,
    trains_towers=trains_towers,
    streams=True,
)
METHODS = (
    _FLYP,
    replace(
        _FLYP,
        name="wise_ft",
        label="FLYP averaged with zero-shot",
        how="the mean of FLYP's weights and zero-shot's (arXiv 2109.01903)",
        adapt=_wise_ft,
    ),
    Method(
        name="self_training",
        label="self-training",
        how="self-training on its own labels",
        adapt=_self_training,
        reads="sentences",
        sections=_SECTIONS,
        works_on_features=True,
        streams=True,
    ),
    Method(
        name="class_descriptions",
        label="zero-shot with class descriptions",
        how="not at all: the classifier is the text tower's reading of the class names, described",
        adapt=_class_descriptions,
        reads="class_texts",
        is_seeded=False,
        learns_from_images=False,
        streams=True,
    ),
)
