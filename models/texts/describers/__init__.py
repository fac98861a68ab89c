"""Describers write texts about images and class names. One small protocol; each real describer is a module of its own.

``tags`` and ``sidecar`` know their texts already. A multimodal model is an :class:`Engine`, prompts in and texts out,
and :class:`~models.texts.describers.prompted.Prompted` puts questions to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from latteflow.models.errors import ModelError
from latteflow.models.settings import Settings

_UNSEEN = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+")

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

Kind = Literal["image", "group", "class", "pair", "class_pair"]
"""A text about one image, about what the images of a group have in common, about a class name, or about how one image
or class differs from another."""


@dataclass(frozen=True)
class Item:
    """What one text is to be about. A describer uses what it understands.

    Attributes:
        paths: of the images below their source; none for a class.
        features: looks up the unit image features of the untouched CLIP, not centred, ``(images, dim)``.
        images: decodes the images; called in a thread, ahead of the engine.
        prompt: the question to a language model.
        seed: fixes a model's draws; from the caption's key, so that a text does not depend on its neighbours.
        captions: what stands for the images, which are then not shown: of a pair the two descriptions or names.
    """

    paths: tuple[str, ...]
    features: Callable[[], np.ndarray]
    images: Callable[[], list[Image]]
    prompt: str
    seed: int
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Text:
    """One text and how it ended. Flagged texts are kept and counted, never silently dropped."""

    text: str
    flags: tuple[str, ...] = ()
    finish_reason: str = "stop"
    """stop, length, or error: the model cannot answer this prompt, and ``detail`` says why."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    detail: str = ""

    @classmethod
    def failed(cls, why: object) -> Text:
        """No text, and why."""
        return cls("", ("error",), "error", detail=(tidy(str(why)) or type(why).__name__)[:500])


def tidy(text: str) -> str:
    """One line that can be stored and shown anywhere: control characters and lone surrogates are white space."""
    return _UNSEEN.sub(" ", text).strip()


class Describer(Protocol):
    """A writer of texts."""

    engine: str
    """What runs it, with its version."""

    def describe(self, kind: Kind, items: Sequence[Item]) -> Iterator[Mapping[int, Text]]:
        """Texts by the place of their item, some at a time and in any order, as they come: keep them at once.

        Raises:
            EngineStopped: it cannot go on.
        """


@dataclass(frozen=True)
class Prompt:
    """One question to a model: the images, if any, then the text."""

    text: str
    images: Callable[[], list[Image]]
    """Decodes them; may be called in any thread, costs time and memory, and may fail. EngineStopped is for all prompts,
    anything else for this one."""
    seed: int


class Engine(Protocol):
    """A multimodal or text model, in this process or behind a server."""

    waited: float
    """Share of its time that it waited for images, 0 to 1."""

    @property
    def version(self) -> str:
        """What runs the model, with its version."""

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Text]]:
        """The place of a prompt and its text, as they come; images are decoded ahead, and few are held at a time.

        A prompt that this model can never answer (an image that cannot be decoded or that its processor rejects, more
        tokens than its context) comes back as :meth:`Text.failed`; the others are answered.

        Raises:
            EngineStopped: the engine or its server died, or kept failing.
        """


@dataclass(frozen=True)
class Writer:
    """A kind of describer that a package brings.

    Attributes:
        settings: with a field ``kind`` that is one literal. What is a
            :class:`~models.settings.LanguageModelSettings` is asked the questions of a prompt pack; anything in the
            settings shapes the texts.
        open: settings to an :class:`Engine`, if they are a language model's, else to a
            :class:`Describer`. What is slow to load is best kept for the next call.
    """

    settings: type[Settings]
    open: Callable[[Any], Describer | Engine]


class EngineStopped(ModelError):
    """An engine cannot go on. Texts that came before are kept; running again asks only for those that are missing."""
