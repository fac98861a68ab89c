"""Describers write texts about images. One small protocol; each real describer is a module of its own.

``tags`` and ``sidecar`` know their texts already. A multimodal model is an :class:`Engine`, prompts in and texts out,
and :class:`~models.describers.prompted.Prompted` puts the questions of a prompt pack to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from models.errors import ModelError

if TYPE_CHECKING:
    from PIL.Image import Image

Kind = Literal["image", "group", "class"]
"""A text about one image, about what the images of a group have in common, or about a class name."""


@dataclass(frozen=True)
class Item:
    """What one text is to be about. A describer uses what it understands.

    Attributes:
        paths: of the images below their source.
        features: unit image features of the untouched CLIP, not centred, ``(images, dim)``.
        label: name of the class that the untouched CLIP sees in the images, for prompts that ask for it.
        images: decodes the images; called in a thread, ahead of the engine.
        seed: fixes a model's draws; from the caption's key, so that a text does not depend on its neighbours.
    """

    paths: tuple[str, ...]
    features: np.ndarray
    label: str
    images: Callable[[], list[Image]]
    seed: int


@dataclass(frozen=True)
class Text:
    """One text and how it ended. Flagged texts are kept and counted, never silently dropped."""

    text: str
    flags: tuple[str, ...] = ()
    finish_reason: str = "stop"
    """stop, length, or error: the model can never answer this prompt, and the text says why."""
    prompt_tokens: int = 0
    output_tokens: int = 0


class Describer(Protocol):
    """A writer of texts."""

    def describe(self, kind: Kind, items: Sequence[Item]) -> list[Text]:
        """One text for each item, in order.

        Raises:
            EngineStopped: it cannot go on; the texts that are done come with the error.
        """


@dataclass(frozen=True)
class Prompt:
    """One question to a model: the images, then the text."""

    text: str
    images: tuple[Image, ...]
    seed: int


class Engine(Protocol):
    """A multimodal or text model, in this process or behind a server."""

    def generate(self, prompts: Sequence[Prompt]) -> list[Text]:
        """One text for each prompt, in order; continuous batching is the engine's business.

        A prompt that this model can never answer (an image its processor rejects, more tokens than its context) comes
        back as a text with ``finish_reason`` error; the others are answered.

        Raises:
            EngineStopped: the engine or its server died, or kept failing; what is done comes with the error.
        """


class EngineStopped(ModelError):
    """An engine cannot go on: running again may help, and asks only for what is missing.

    Attributes:
        done: texts by the place of their prompt.
    """

    def __init__(self, message: str, done: Mapping[int, Text]) -> None:
        super().__init__(message)
        self.done = done
