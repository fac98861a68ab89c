"""What the gate lets pass and how estimates rank models, against the truth.

    python -m benchmarks.selection domains/demo.yaml domains/clipart.yaml [--steps 640] [--store runs/store]

Each domain as `benchmarks.accuracy` has it: whole, with a long tail, and with a quarter of its classes. Every method of
METHODS is adapted and judged on the images it was adapted to, and scored on the test images; so are broken models: of
class names in the wrong order, of a far too high learning rate, of texts that belong to other images, and prototypes
that have collapsed. A model is *better* or *worse* than the better zero-shot if top-1 differs by more than a point;
between, either answer will do. Labels are opened when everything was judged.

The second table compares estimates of accuracy that need no label: Spearman's rank correlation with top-1 over all
models of a case, the two zero-shots and broken ones among them, mean and worst over the cases; and what one would gain
over the better zero-shot by always taking the model with the highest estimate.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.accuracy import Case, Images, answers, build
from models.adaptation import Adapted, TuneData
from models.losses import unit
from models.methods import adapt
from models.selection import NEIGHBOURS, estimates, judge, kappa
from models.settings import DEFAULT_STEPS, LatteClipSettings, Method, TransductionSettings
from models.transduction import nearest, transduce
from tasks.domain import Domain

METHODS: tuple[Method, ...] = ("latteclip", "latteclip_plus", "transduction")
IMBALANCE = 50
EVEN = 0.01
"""Differences in top-1 that count as none."""


@dataclass(frozen=True)
class Row:
    """One model: how it differs from the better zero-shot, what the gate said, and what the estimates say.

    Zero-shot itself is not judged: ``accepted`` is None.
    """

    case: str
    model: str
    gain: float
    accepted: bool | None
    estimates: Mapping[str, float]


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


def models(case: Case, broken: bool, steps: int) -> Iterator[tuple[str, Adapted]]:
    """By name."""
    data, draws = case.data(), torch.Generator().manual_seed(0)

    epochs = math.ceil(steps / LatteClipSettings().n_steps(len(data)))

    def adapted(method: Method, data: TuneData, **settings: Any) -> Adapted:
        cfg = LatteClipSettings(epochs=epochs, **settings)
        return adapt(method, data, cfg, TransductionSettings(), scale=case.scale)

    for method in METHODS:
        yield method, adapted(method, data)
    if broken:
        for method in ("latteclip", "transduction"):
            yield f"{method}, wrong names", adapted(method, wrong_names(data, draws))
        yield "latteclip, rate 0.1", adapted("latteclip", data, lr=0.1, scale=100.0)
        yield "latteclip, others' texts", adapted("latteclip", others_texts(data, draws), alpha=0.3)
        near = case.class_texts[:1] + 0.02 * unit(torch.randn(case.class_texts.shape, generator=draws))
        yield "collapsed", Adapted(prototypes=unit(near), scale=case.scale)


def rows(name: str, case: Case, broken: bool, steps: int) -> Iterator[Row]:
    """Everything of a case, judged and scored."""
    features, n_classes = unit(case.train.embeds), len(case.class_texts)
    near = nearest(features, NEIGHBOURS)[0]
    shots = {shot: Adapted(prototypes=case.class_texts, scale=case.scale) for shot in ("plain", "centred")}

    def logits(images: Images, found: Adapted) -> Tensor:
        return found.scale * answers(found, case if found is not shots["plain"] else plain, images)

    def top1(found: Adapted) -> float:
        return float((logits(case.test, found).argmax(1).numpy() == case.test.truth).mean())

    plain = replace(case, centred=False)
    zero_shots = {shot: logits(case.train, found).argmax(1) for shot, found in shots.items()}
    own = zero_shots["centred" if case.centred else "plain"]
    in_space = case.features(case.train, case.centred)
    together = transduce(TransductionSettings(), in_space, case.class_texts, case.scale).assignments.argmax(1)
    told = (case.train.texts @ case.class_texts.T).argmax(1)[case.train.has_text]
    before = max(top1(found) for found in shots.values())
    for model, found in [*shots.items(), *models(case, broken, steps)]:
        probabilities = logits(case.train, found).softmax(1)
        labels = probabilities.argmax(1)
        guesses = estimates(probabilities, own, near)
        guesses["transduction"] = kappa(labels, together, n_classes)
        guesses["captions"] = kappa(labels[case.train.has_text], told, n_classes)
        guesses["vouched + captions"] = guesses["vouched"] + guesses["captions"]
        verdict = judge(features, labels, zero_shots, n_classes)
        guesses["duel"] = min(each.score for each in verdict.duels.values())
        yield Row(name, model, top1(found) - before, None if model in shots else verdict.accepted, guesses)


def summary(found: list[Row], chosen: Callable[[Row], bool]) -> str:
    """Counts of right and wrong decisions."""
    kinds = Counter(
        ("better" if row.gain > EVEN else "worse" if row.gain < -EVEN else "even", row.accepted)
        for row in found
        if row.accepted is not None and chosen(row)
    )
    cells = [kinds[kind, accepted] for kind in ("better", "even", "worse") for accepted in (True, False)]
    return " | ".join(map(str, cells))


def ranking(found: list[Row]) -> str:
    """A line for each estimate, the best first."""
    cases = [[row for row in found if row.case == case] for case in dict.fromkeys(row.case for row in found)]
    lines = {}
    for name in found[0].estimates:
        # A collapsed model may have the same value as another, or all of them one: no correlation, not an error.
        rho = np.nan_to_num(
            [spearmanr([r.estimates[name] for r in case], [r.gain for r in case]).statistic for case in cases]
        )
        gains = [100 * max(case, key=lambda row: row.estimates[name]).gain for case in cases]
        cells = f"{np.mean(rho):+.2f} | {np.min(rho):+.2f} | {np.mean(gains):+.1f} | {np.min(gains):+.1f}"
        lines[f"| {name} | {cells} |"] = np.mean(rho)
    head = (
        "| estimate | correlation | worst case | gain of its choice | worst case |\n| --- | --- | --- | --- | --- |\n"
    )
    return head + "\n".join(sorted(lines, key=lines.__getitem__, reverse=True))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("domains", nargs="+", type=Path)
    options.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="of training")
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
                for row in rows(f"{domain.name} {kind} {number}", case, kind == "inductive", chosen.steps):
                    found.append(row)
                    said = {None: "zero-shot", True: "accepted", False: "refused"}[row.accepted]
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
    sys.stdout.write("\n".join(lines) + f"\n\n{ranking(found)}\n")


if __name__ == "__main__":
    main()
