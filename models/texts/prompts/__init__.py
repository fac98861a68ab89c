"""Prompt packs: the questions that are put to a language model, one versioned YAML file for each kind of domain."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, StringConstraints, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from latteflow.models.errors import ModelError
from latteflow.models.settings import Settings, one_or_many

_VARIABLE = re.compile(r"\{(\w*)\}")
_KNOWN = {
    "class": "the name of the class that the untouched CLIP sees in the image, or that the question is about",
    "first": "the description of the first image of a pair, or the name of its first class",
    "second": "the same of the second",
}
_PAIRED = {"first", "second"}
PAIR = (
    'What is the visual difference between an image with a description of "{first}" and an image with a description '
    'of "{second}"? Answer in one sentence of at most 40 words that speaks of the first image first, as "the first '
    'image", and only of what can be seen.'
)
"""PC-CLIP's question (3.2), and a line for models that follow instructions."""
CLASS_PAIR = (
    "How does a picture of a {first} differ to the eye from a picture of a {second}? Answer in one sentence of at most "
    "40 words: first what the {first} is or has, then what the {second} is or has."
)


Question = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Questions = Annotated[tuple[Question, ...], BeforeValidator(one_or_many)]


class PromptPack(Settings):
    """The questions of one kind of domain.

    ``{class}`` stands for a class name; other braces are themselves.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    """Kept beside every text, with the version."""
    version: int = Field(ge=1)
    """Counts changes. A text is keyed by what was asked in words, so a change asks again just what it changes."""
    source: str = ""
    """Where the questions come from."""
    variables: tuple[str, ...] = ()
    """Those that the questions use."""
    image: Questions
    """About one image. Several give several texts, which are compared with each other."""
    group: Questions
    """About what the images of a group have in common."""
    classes: Questions = ()
    """About a class name, without an image."""
    pair: Question = PAIR
    """About how one image differs from another; the model is told the two descriptions and sees no image."""
    class_pair: Question = CLASS_PAIR
    """About how one class differs from another."""

    @model_validator(mode="after")
    def _questions_can_be_asked(self) -> PromptPack:
        if not (self.image and self.group):
            raise ValueError("`image` and `group` need at least one question each")
        own = [getattr(self, name) for name in ("pair", "class_pair") if name in self.model_fields_set]
        asked = (*self.image, *self.group, *self.classes, *own)
        used = {name for question in asked for name in _VARIABLE.findall(question)}
        if unknown := sorted((used | set(self.variables)) - _KNOWN.keys()):
            raise ValueError(f"{{{unknown[0]}}} is no variable; known: {', '.join(f'{{{name}}}' for name in _KNOWN)}")
        if missing := sorted(used - set(self.variables)):
            raise ValueError(
                f"{{{missing[0]}}} is used and not declared; write `variables: [{', '.join(sorted(used))}]`"
            )
        if idle := sorted(set(self.variables) - used):
            raise ValueError(f"`variables` declares {idle[0]!r}, which no question uses")
        if any("{class}" not in question for question in self.classes):
            raise ValueError("each question under `classes` needs {class}, or all classes get the same text")
        if any(set(_VARIABLE.findall(question)) != _PAIRED for question in own):
            raise ValueError("`pair` and `class_pair` need {first} and {second}, and have no other variable")
        if any(_PAIRED & {*_VARIABLE.findall(question)} for question in (*self.image, *self.group, *self.classes)):
            raise ValueError("{first} and {second} are for `pair` and `class_pair`")
        return self

    @property
    def id(self) -> str:
        """Name and version."""
        return f"{self.name}/{self.version}"


def fill(question: str, **values: str) -> str:
    """The question with its variables filled in, each once: braces in a class name are themselves."""
    return _VARIABLE.sub(lambda found: values[found.group(1)], question)


def shipped() -> list[str]:
    """Names of the packs that come with latteflow."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def is_path(name: str) -> bool:
    """Whether this is a user's own pack, and not one that ships."""
    return "/" in name or name.endswith((".yaml", ".yml"))


def load(name: str) -> PromptPack:
    """A pack that ships, by name, or a user's, by the path of its file.

    Raises:
        ModelError: there is none, or it has mistakes; all of them are listed.
    """
    path = Path(name) if is_path(name) else Path(__file__).parent / f"{name}.yaml"
    if not path.is_file():
        why = f"there is no file {path}" if is_path(name) else f"known are {', '.join(shipped())}"
        raise ModelError(f"prompt pack {name!r}: {why}")
    try:
        raw = YAML(typ="safe").load(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, YAMLError) as error:
        raise ModelError(f"prompt pack {path} cannot be read: {error}") from error
    try:
        return PromptPack.model_validate(raw)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, each['loc'])) or 'pack'}: {each['msg'].removeprefix('Value error, ')}"
            for each in error.errors()
        ]
        raise ModelError("\n".join([f"prompt pack {path} has {len(lines)} mistake(s):", *lines])) from error
