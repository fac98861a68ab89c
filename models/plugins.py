"""What installed packages add, by entry points."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from latteflow.models.errors import ModelError

T = TypeVar("T")


def found(group: str, kind: type[T]) -> list[tuple[str, T]]:
    """Everything of a group, each with the package it comes from.

    Raises:
        ModelError: one cannot be loaded, or is not of this kind.
    """
    return [(_package(point), _loaded(point, kind)) for point in entry_points(group=group)]


def _loaded(point: EntryPoint, kind: type[T]) -> T:
    try:
        value = point.load()
    except Exception as error:  # somebody else's code
        raise ModelError(f"{point.value!r} of {_package(point)} cannot be loaded: {error!r}") from error
    if not isinstance(value, kind):
        raise ModelError(f"{point.value!r} of {_package(point)} is no {kind.__name__} but {type(value).__name__}")
    return value


def _package(point: EntryPoint) -> str:
    return f"the package {point.dist.name}" if point.dist else "an installed package"
