"""What installed packages add, by entry points."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from latteflow.models.errors import ModelError

T = TypeVar("T")


def found(group: str, kind: type[T], what: str, name: Callable[[T], str], ours: Collection[str]) -> dict[str, T]:
    """Everything of a group, by name.

    Args:
        what: they are, in words.
        ours: names that are taken.

    Raises:
        ModelError: one cannot be loaded, is not of this kind, or has a name that is taken.
    """
    added: dict[str, T] = {}
    for point in _installed().select(group=group):
        value = _loaded(point, kind)
        if (own := name(value)) in (*ours, *added):
            raise ModelError(f"{_package(point)} brings a {what} {own!r}, and there is one of that name")
        added[own] = value
    return added


@functools.cache
def _installed() -> Any:  # Python 3.11 and 3.12 call it differently
    """The entry points of every package, which are a few hundred small files."""
    return entry_points()


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
