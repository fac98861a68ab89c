"""What somebody else's package brings: a method, and a describer that says how bright a picture is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from latteflow.models.methods.method import Given, Method, Section
from latteflow.models.settings import Settings
from latteflow.models.texts.describers import Item, Kind, Text, Writer

if TYPE_CHECKING:
    from latteflow.models.methods.adaptation import Adapted


class MedoidSettings(Settings):
    """Of medoids."""

    images: int = Field(default=5, ge=1)
    """How many of the images that are likeliest of a class stand for it."""


def adapt(given: Given) -> Adapted:
    """The classifier is the mean of each class's text and the images that are most like it."""
    from latteflow.models.methods.adaptation import Adapted
    from latteflow.models.vectors import unit

    features, texts = given.data.image_features, given.data.class_features
    best = (texts @ features.T).topk(min(given.of(MedoidSettings).images, len(features))).indices
    return Adapted(prototypes=unit(texts + unit(features[best].mean(1))), scale=given.scale)


METHOD = Method(
    name="medoids",
    label="Medoids",
    how="medoids of a test package",
    adapt=adapt,
    sections={"medoids": Section(MedoidSettings)},
    is_seeded=False,
)


class BrightnessSettings(Settings):
    """Of the describer."""

    kind: Literal["brightness"]
    """Who writes the texts."""
    word: str = "bright"
    """What a bright picture is called."""


class Brightness:
    """Says whether a picture is bright."""

    engine = "brightness 1.0"

    def __init__(self, settings: BrightnessSettings) -> None:
        self._word = settings.word

    def describe(self, kind: Kind, items: Sequence[Item]) -> Iterator[dict[int, Text]]:
        """One sentence for each item."""
        for place, item in enumerate(items):
            is_bright = np.mean([np.asarray(image).mean() for image in item.images()]) > 127
            yield {place: Text(f"a {self._word if is_bright else 'dark'} picture")}


WRITER = Writer(BrightnessSettings, Brightness)
