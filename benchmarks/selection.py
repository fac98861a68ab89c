"""What the gate lets pass and what it refuses, against the truth: `python -m benchmarks.selection domains/*.yaml`.

Each domain as `benchmarks.accuracy` has it: whole, with a long tail, and with a quarter of its classes. Every method of
METHODS is adapted and judged on the images it was adapted to, and scored on the test images; so are broken models: of
class names in the wrong order, of a far too high learning rate, of texts that belong to other images, and prototypes
that have collapsed. A model is *better* or *worse* than the better zero-shot if top-1 differs by more than a point;
between, either answer will do. Labels are opened when everything was judged.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy import Case, build
from models.adaptation import Adapted, TuneData
from models.losses import unit
from models.methods import adapt
from models.selection import judge
from models.settings import LatteClipSettings, Method, TransductionSettings
from tasks.domain import Domain

METHODS: tuple[Method, ...] = ("latteclip", "latteclip_plus", "transduction")
IMBALANCE = 50
EVEN = 0.01
"""Differences in top-1 that count as none."""


@dataclass(frozen=True)
class Row:
    """One model: how it differs from the better zero-shot, and what the gate said."""

    case: str
    model: str
    gain: float
    accepted: bool


def wrong_names(data: TuneData, draws: torch.Generator) -> TuneData:
    """The classes' names in another order, and the pseudo-labels that come of it."""
    order = torch.randperm(len(data.class_texts), generator=draws)
    names = data.class_texts[order]
    return replace(data, class_texts=names, pseudo_labels=(data.image_features @ names.T).argmax(1))


def others_texts(data: TuneData, draws: torch.Generator) -> TuneData:
    """Descriptions of other images."""
    order = torch.randperm(len(data), generator=draws)
    assert data.image_texts is not None and data.has_image_text is not None
    return replace(data, image_texts=data.image_texts[order], has_image_text=data.has_image_text[order])


def models(case: Case, broken: bool) -> Iterator[tuple[str, Adapted]]:
    """By name."""
    data, draws = case.data(), torch.Generator().manual_seed(0)

    def adapted(method: Method, data: TuneData, **settings: Any) -> Adapted:
        return adapt(method, data, LatteClipSettings(**settings), TransductionSettings(), scale=case.scale)

    for method in METHODS:
        yield method, adapted(method, data)
    if broken:
        for method in ("latteclip", "transduction"):
            yield f"{method}, wrong names", adapted(method, wrong_names(data, draws))
        yield "latteclip, rate 0.1", adapted("latteclip", data, lr=0.1, scale=100.0)
        yield "latteclip, others' texts", adapted("latteclip", others_texts(data, draws), alpha=0.3)
        near = case.class_texts[:1] + 0.02 * unit(torch.randn(case.class_texts.shape, generator=draws))
        yield "collapsed", Adapted(prototypes=unit(near), scale=case.scale)


def rows(name: str, case: Case, broken: bool) -> Iterator[Row]:
    """Everything of a case, judged and scored."""

    def classes(embeds: Tensor, centred: bool, found: Adapted | None = None) -> Tensor:
        moved = embeds - case.centre if centred else embeds
        image_map = None if found is None else found.image_map
        features = unit(moved if image_map is None else moved @ image_map)
        return (features @ (case.class_texts if found is None else found.prototypes).T).argmax(1)

    def top1(labels: Tensor) -> float:
        return float((labels.numpy() == case.test.truth).mean())

    shots = {"plain": False, "centred": True}
    zero_shots = {shot: classes(case.train.embeds, centred) for shot, centred in shots.items()}
    base = max(top1(classes(case.test.embeds, centred)) for centred in shots.values())
    for model, found in models(case, broken):
        labels = classes(case.train.embeds, case.centred, found)
        verdict = judge(unit(case.train.embeds), labels, zero_shots, len(case.class_texts))
        yield Row(name, model, top1(classes(case.test.embeds, case.centred, found)) - base, verdict.accepted)


def summary(found: list[Row], chosen: Callable[[Row], bool]) -> str:
    """Counts of right and wrong decisions."""
    kinds = Counter(
        ("better" if row.gain > EVEN else "worse" if row.gain < -EVEN else "even", row.accepted)
        for row in found
        if chosen(row)
    )
    cells = [kinds[kind, accepted] for kind in ("better", "even", "worse") for accepted in (True, False)]
    return " | ".join(map(str, cells))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("domains", nargs="+", type=Path)
    options.add_argument("--store", help="instead of the domains' own")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    found: list[Row] = []
    for path in chosen.domains:
        domain = Domain.load(path)
        if chosen.store:
            domain = domain.model_copy(update={"store": str(Path(chosen.store).resolve())})
        for kind, cases in build(domain, [IMBALANCE], True, ["inductive"]):
            for number, case in enumerate(cases):
                for row in rows(f"{domain.name} {kind} {number}", case, kind == "inductive"):
                    found.append(row)
                    said = "accepted" if row.accepted else "refused"
                    sys.stderr.write(f"{row.case}: {row.model} {100 * row.gain:+.1f} {said}\n")
    lines = [
        "| | better, accepted | better, refused | even, accepted | even, refused | worse, accepted | worse, refused |"
    ]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for name, wanted in {
        "whole domains": lambda row: "inductive" in row.case and row.model in METHODS,
        "long tails": lambda row: "imbalance" in row.case,
        "a quarter of the classes": lambda row: "few" in row.case,
        "broken models": lambda row: row.model not in METHODS,
    }.items():
        lines.append(f"| {name} | {summary(found, wanted)} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
