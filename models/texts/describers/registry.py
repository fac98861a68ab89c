"""Every kind of describer, by the name it has in a domain file: ours, and those of packages that are installed.

A package adds its own by an entry point of the group ``latteflow.describers``: a
:class:`~models.texts.describers.Writer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Union, get_args

from pydantic import Discriminator, Tag

from latteflow.models.errors import ModelError
from latteflow.models.plugins import found
from latteflow.models.settings import OpenAISettings, Settings, SidecarSettings, TagsSettings, VllmSettings, kind_of
from latteflow.models.texts.describers import Writer

GROUP = "latteflow.describers"


def _kind(settings: type[Settings]) -> str:
    named = get_args(settings.model_fields["kind"].annotation) if "kind" in settings.model_fields else ()
    if len(named) != 1:
        raise ModelError(f"{settings.__name__} is no describer's: it needs a field `kind` that is one literal")
    return str(named[0])


_OURS = {_kind(each): each for each in (TagsSettings, SidecarSettings, VllmSettings, OpenAISettings)}
WRITERS = found(GROUP, Writer, "describer", lambda writer: _kind(writer.settings), _OURS)
"""Those of packages, by kind."""
KINDS: Mapping[str, type[Settings]] = {**_OURS, **{kind: writer.settings for kind, writer in WRITERS.items()}}
"""Settings of all, by kind."""

if TYPE_CHECKING:
    DescriberSettings = TagsSettings | SidecarSettings | VllmSettings | OpenAISettings
else:
    DescriberSettings = Annotated[
        Union[tuple(Annotated[settings, Tag(kind)] for kind, settings in KINDS.items())],  # noqa: UP007
        Discriminator(kind_of),
    ]
"""Who writes the texts: ``kind`` says which."""
