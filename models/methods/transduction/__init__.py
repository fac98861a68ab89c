"""Anchored transduction: all images of a domain classified together, on frozen features (docs/methods.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from latteflow.models.methods.method import Given, Method, Section
from latteflow.models.settings import Settings

if TYPE_CHECKING:
    from latteflow.models.methods.adaptation import Adapted


class TransductionSettings(Settings):
    """Anchored transduction, by itself and in latteclip_plus (docs/methods.md)."""

    neighbours: int = Field(default=8, ge=1)
    """Nearest images that an image's text beliefs travel from."""
    spread: float = Field(default=0.5, ge=0, lt=1)
    """How much of an image's beliefs is its neighbours', who have most of theirs from their own neighbours. 0: none."""
    shrinkage: float = Field(default=0.03, gt=0)
    """Added to the covariance, in units of its largest eigenvalue. Large values make the mixture spherical."""
    anchor: float = Field(default=20.0, gt=0)
    """How many images at its text's place each class's mean begins with: what holds classes with few images."""
    max_steps: int = Field(default=30, ge=1)
    """Rounds of means and assignments at most."""
    tolerance: float = Field(default=1e-4, ge=0)
    """The rounds end when fewer than this share of the assignments moves."""


def _adapt(given: Given) -> Adapted:
    from latteflow.models.methods.adaptation import Adapted
    from latteflow.models.methods.transduction.tuning import nearest, transduce

    data, cfg = given.data, given.of(TransductionSettings)
    near = None if data.near_features is None else nearest(data.near_features, cfg.neighbours)
    found = transduce(cfg, data.image_features, data.class_features, given.scale, near=near)
    return Adapted(prototypes=found.prototypes, scale=given.scale, assignments=found.assignments)


METHOD = Method(
    name="transduction",
    label="anchored transduction",
    how="anchored transduction: prototypes from all images at once",
    adapt=_adapt,
    sections={"transduction": Section(TransductionSettings)},
    is_seeded=False,
    streams=True,
)
