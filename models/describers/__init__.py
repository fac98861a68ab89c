"""Describers write texts about images. One small protocol; each real describer is a module of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

Kind = Literal["image", "group"]
"""A text about one image, or about what the images of a group have in common."""


@dataclass(frozen=True)
class Item:
    """What one text is to be about. A describer uses what it understands.

    Attributes:
        paths: of the images below their source.
        features: unit image features of the untouched CLIP, not centred, ``(images, dim)``.
    """

    paths: tuple[str, ...]
    features: np.ndarray


@dataclass(frozen=True)
class Text:
    """One text and how it ended. Flagged texts are kept and counted, never silently dropped."""

    text: str
    flags: tuple[str, ...] = ()
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    output_tokens: int = 0


class Describer(Protocol):
    """A writer of texts."""

    def describe(self, kind: Kind, items: Sequence[Item]) -> list[Text]:
        """One text for each item, in order."""
