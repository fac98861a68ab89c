"""What each night of a domain came to: kept in the store, where it outlives the records of Prefect's server."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from latteflow.storage.artifacts import ArtifactStore
from latteflow.storage.register import Register
from latteflow.tasks.core.domain import Domain


@dataclass(frozen=True)
class Night:
    """One night, however it ended.

    Attributes:
        at: when it began, ISO 8601 in UTC.
        state: Promoted, Kept, Unchanged, Skipped or Failed.
        why: about the decision, or what went wrong.
        seconds: wall time.
        images, quarantined: that the source has now.
        new, removed: images that came and went since the last night.
        retired: texts about images that went; they stay in the store, and nothing uses them.
        made: stages that ran; the others were cached.
        champion: version that is served after it; 0 if none.
    """

    at: str
    state: str
    why: str
    seconds: float = 0.0
    images: int = 0
    quarantined: int = 0
    new: int = 0
    removed: int = 0
    retired: int = 0
    made: tuple[str, ...] = ()
    champion: int = 0

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Night:
        return cls(**{**record, "made": tuple(record["made"])})


def remember(store: ArtifactStore, domain: str, night: Night) -> None:
    """Add a night to those of a domain."""
    register = _register(store, domain)
    while not register.replace(max(register.versions(), default=0), asdict(night)):
        continue  # another night ended at the same moment


def nights(store: ArtifactStore, domain: str, newest: int | None = None) -> list[Night]:
    """The nights of a domain that came to an end, oldest first; those that were killed left no word.

    Args:
        newest: only so many of the last ones.
    """
    register = _register(store, domain)
    versions = register.versions()
    return [Night.of(register.record(version)) for version in versions[-newest if newest else 0 :]]


def missed(found: Sequence[Night]) -> list[int]:
    """Of how many nights nothing was heard before each of these, as one comes every day, ``(n,)``."""
    began = [datetime.fromisoformat(each.at) for each in found]
    days = [(later - earlier).total_seconds() / 86400 for earlier, later in itertools.pairwise(began)]
    return [0, *(max(0, round(each) - 1) for each in days)][: len(found)]


def write_page(domain: Domain, found: Sequence[Night], path: Path | None = None) -> Path:
    """Write the page, by default to ``OUTPUT/<name>/nights.html``; returns where it is."""
    from latteflow.tasks.report.html import html  # with all that pages need

    silent = missed(found)
    rows = [{"night": each, "missed": count} for each, count in zip(found, silent, strict=True)]
    states = Counter(each.state for each in found)
    text = html("nights.html.j2", domain=domain.name, rows=rows[::-1], states=states, silent=sum(silent))
    path = path or Path(domain.output) / domain.name / "nights.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _register(store: ArtifactStore, domain: str) -> Register:
    return Register(store.objects, f"{domain}/nights")
