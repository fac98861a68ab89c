"""What a deployment is told: a domain, or where its file is."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import fsspec
from pydantic import BeforeValidator, Field

from tasks.domain import Domain
from tasks.errors import ConfigError


def domain_of(given: Any) -> Any:
    """The domain of a file, by its path or fsspec URL; anything but a text is returned as it is.

    A path is one of the machine that runs the flow, where the deployment's pull step has led: relative to the project's
    root.

    Raises:
        ConfigError: there is no such file, or it is no domain file; each mistake with its line.
    """
    if not isinstance(given, str):
        return given
    if "://" not in given:
        return Domain.load(given)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / given.rsplit("/", 1)[-1]
        try:
            with fsspec.open(given, "rb") as file:
                copy.write_bytes(file.read())
        except Exception as error:  # each file system's and its driver's own
            raise ConfigError(f"domain file {given!r} cannot be read: {type(error).__name__}: {error}") from error
        domain = Domain.load(copy)
    near = sorted(name for name, value in domain.model_dump().items() if _lies_in(value, folder) and name != "output")
    if near:
        raise ConfigError(
            f"domain file {given!r}: {', '.join(f'`{name}`' for name in near)} must be a URL or begin with /, as "
            "nothing lies beside a file that is read from a URL"
        )
    return domain


def _lies_in(value: Any, folder: str) -> bool:
    if isinstance(value, dict):
        return any(_lies_in(each, folder) for each in value.values())
    if isinstance(value, list):
        return any(_lies_in(each, folder) for each in value)
    return isinstance(value, str) and value.startswith(str(Path(folder).resolve()))


DomainOrFile = Annotated[
    Domain,
    BeforeValidator(domain_of, json_schema_input_type=Domain | str),
    Field(description="A domain file: its path or URL; or what would stand in it."),
]
