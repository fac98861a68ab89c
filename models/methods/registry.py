"""Every way to adapt to a domain, by the name it has in a domain file: ours, and those of packages that are installed.

A package adds its methods by an entry point of the group ``latteflow.methods``: a
:class:`~models.methods.method.Method`. Domain file, training, gate, report, export and card know it from then on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from latteflow.models.errors import ModelError
from latteflow.models.methods import baselines, clamp, latteclip, latteclip_plus, pc_clip, transduction
from latteflow.models.methods.method import Given, Method, Sections
from latteflow.models.plugins import found
from latteflow.models.settings import Settings, TrainingSettings

if TYPE_CHECKING:
    from torch import nn

    from latteflow.models.methods.adaptation import Adapted, TuneData

GROUP = "latteflow.methods"
_OURS = {
    method.name: method
    for method in (
        latteclip.METHOD, latteclip_plus.METHOD, pc_clip.METHOD, transduction.METHOD, clamp.METHOD, *baselines.METHODS,
    )
}  # fmt: skip


def _sections(methods: Mapping[str, Method]) -> Mapping[str, type[Settings]]:
    sections: dict[str, type[Settings]] = {}
    for method in methods.values():
        for name, section in method.sections.items():
            if sections.setdefault(name, section.settings) is not section.settings:
                raise ModelError(f"method {method.name!r}: the section {name!r} belongs to another method")
    return sections


METHODS: Mapping[str, Method] = {**_OURS, **found(GROUP, Method, "method", lambda each: each.name, _OURS)}
"""By name."""
SECTIONS = _sections(METHODS)
"""Settings of the methods, by the name of their section in a domain file."""
_ZERO_SHOTS = {
    "zero_shot_plain": "plain zero-shot",
    "zero_shot_centred": "domain-centred zero-shot",
    "zero_shot_estimated": "estimated zero-shot",
}


def label(name: str) -> str:
    """A method or zero-shot for people."""
    return _ZERO_SHOTS.get(name) or METHODS[name].label


def readers(section: str) -> list[Method]:
    """The methods that a section of the domain file is for."""
    return [method for method in METHODS.values() if section in method.sections]


def adapt(
    name: str,
    data: TuneData,
    *settings: Settings,
    training: TrainingSettings | None = None,
    clip: nn.Module | None = None,
    seed: int = 0,
    scale: float = 100.0,
    **engine: Any,
) -> Adapted:
    """Adapt by the method of this name; see :class:`~models.methods.method.Given`.

    Args:
        settings: sections, in any order; the others have their defaults.
    """
    given = Given(
        data=data, sections=Sections(*settings), training=training, clip=clip, seed=seed, scale=scale, engine=engine
    )
    return METHODS[name].adapt(given)
