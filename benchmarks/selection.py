"""What the gate lets pass and how estimates rank models, against the truth.

    python -m benchmarks.selection domains/demo.yaml domains/clipart.yaml [--steps 640] [--store runs/store] [--quick]
        [--subsets 15]

Each domain as `benchmarks.accuracy` has it: whole, with a long tail, and with a quarter of its classes. Every method of
JUDGED is adapted and judged on the images it was adapted to, and scored on the test images; so are broken models: of
class names in the wrong order, of a far too high learning rate, of texts that belong to other images, and prototypes
that have collapsed. A model is *better* or *worse* than the better zero-shot if top-1 differs by more than a point;
between, either answer will do. Labels are opened when everything was judged.

`--subsets N` has instead N draws of each domain, every one with a quarter to all of its classes, and half to all of the
evaluation images of these, and prints what the gate lets pass with intervals, as `benchmarks.synthetic` does.

The second table compares estimates of accuracy that need no label: Spearman's rank correlation with top-1 over all
models of a case, zero-shots and broken ones among them, mean and worst over the cases; and what one would gain
over the better zero-shot by always taking the model with the highest estimate.
"""

from __future__ import annotations

import argparse
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

from benchmarks.accuracy import Case, answers, build, heard, opened
from benchmarks.synthetic import kind_of, verdicts
from latteflow.models.judge.halves import halves
from latteflow.models.judge.selection import Evidence, duel, estimates, judge, kappa, neighbours
from latteflow.models.methods.adaptation import Adapted, TuneData
from latteflow.models.methods.latteclip import DEFAULT_STEPS
from latteflow.models.methods.registry import METHODS, adapt
from latteflow.models.methods.transduction import TransductionSettings
from latteflow.models.methods.transduction.tuning import transduce
from latteflow.models.vectors import unit

JUDGED: tuple[str, ...] = ("latteclip", "latteclip_plus", "transduction")
IMBALANCE = 50


@dataclass(frozen=True)
class Row:
    """One model: how it differs from the better zero-shot, what the gate said, and what the estimates say.

    Zero-shot itself is not judged: ``accepted`` is None. ``above_chance`` is the better zero-shot's.
    """

    case: str
    model: str
    gain: float
    above_chance: float
    accepted: bool | None
    estimates: Mapping[str, float]

    @property
    def kind(self) -> str:
        """Against the better zero-shot."""
        return kind_of(self.gain)


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


@dataclass(frozen=True)
class Model:
    """An adapted model, and how its method adapts to some of the images."""

    name: str
    method: str
    found: Adapted
    data: TuneData
    adapt: Callable[[TuneData], Adapted]


def models(case: Case, broken: bool) -> Iterator[Model]:
    """By name."""
    data, draws = case.data(), torch.Generator().manual_seed(0)

    def model(name: str, method: str, data: TuneData, **settings: Any) -> Model:
        cfg = case.settings.model_copy(update=settings)

        def adapted(data: TuneData) -> Adapted:
            return adapt(method, data, cfg, TransductionSettings(), scale=case.scale)

        return Model(name, method, adapted(data), data, adapted)

    for method in JUDGED:
        yield model(method, method, data)
    if broken:
        for method in ("latteclip", "transduction"):
            yield model(f"{method}, wrong names", method, wrong_names(data, draws))
        yield model("latteclip, rate 0.1", "latteclip", data, lr=0.1, scale=100.0)
        yield model("latteclip, others' texts", "latteclip", others_texts(data, draws), alpha=0.3)
        near = case.class_texts[:1] + 0.02 * unit(torch.randn(case.class_texts.shape, generator=draws))
        collapsed = Adapted(prototypes=unit(near), scale=case.scale)
        yield Model("collapsed", "transduction", collapsed, data, lambda data: collapsed)


def rows(name: str, case: Case, broken: bool) -> Iterator[Row]:
    """Everything of a case, judged and scored."""
    features, n_classes = case.features(case.train), len(case.class_texts)
    own, near = (features @ case.class_texts.T).argmax(1), neighbours(features)
    zero_shots = {"plain": 0.0, "centred": 1.0, "estimated": case.share}
    spaces = {
        shot: [case.features(images, share) for images in (case.train, case.test)] for shot, share in zero_shots.items()
    }

    def top1(logits: Tensor) -> float:
        return float((logits.argmax(1).numpy() == case.test.truth).mean())

    before = max(top1(spaces[shot][1] @ case.class_texts.T) for shot in ("plain", "centred"))
    together = transduce(TransductionSettings(), features, case.class_texts, case.scale).assignments.argmax(1)
    told = (case.train.texts @ case.class_texts.T).argmax(1)[case.train.has_text]

    def row(name_of: str, train: Tensor, test: Tensor, model: Model | None = None) -> Row:
        probabilities = (case.scale * train).softmax(1)
        labels = probabilities.argmax(1)
        guesses = estimates(probabilities, own, near)
        guesses["transduction"] = kappa(labels, together, n_classes)
        guesses["captions"] = kappa(labels[case.train.has_text], told, n_classes)
        if model is None:
            return Row(name, name_of, top1(test) - before, before - 1 / n_classes, None, guesses)
        parts = halves(model.data, model.adapt) if METHODS[model.method].reads_image_texts else None
        heard_of = heard(replace(model.data, class_texts=case.class_texts), labels, case.scale, parts)
        verdict = judge([Evidence(guesses["vouched"], duel(features, labels, own))], case.share, heard_of)
        return Row(name, name_of, top1(test) - before, before - 1 / n_classes, verdict.accepted, guesses)

    for shot, space in spaces.items():
        yield row(shot, *(features @ case.class_texts.T for features in space))
    for model in models(case, broken):
        yield row(model.name, *(answers(model.found, case, images) for images in (case.train, case.test)), model)


def summary(found: list[Row], chosen: Callable[[Row], bool]) -> str:
    """Counts of right and wrong decisions."""
    kinds = Counter((row.kind, row.accepted) for row in found if row.accepted is not None and chosen(row))
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


def subset(case: Case, seed: int) -> Case:
    """Some of the classes, and some of their test images, which are also what is adapted to."""
    draw, n_classes = np.random.default_rng(seed), len(case.class_texts)
    least = max(2, n_classes // 4)
    kept = np.sort(draw.permutation(n_classes)[: draw.integers(least, n_classes + 1)])
    rows = np.flatnonzero(np.isin(case.test.truth, kept))
    rows = np.sort(draw.permutation(rows)[: round(draw.uniform(0.5, 1.0) * len(rows))])
    part = case.test.only(rows)
    part = replace(part, truth=np.searchsorted(kept, part.truth))
    return replace(case, train=part, test=part, class_texts=case.class_texts[torch.from_numpy(kept)])


def table(found: list[Row]) -> str:
    """Right and wrong decisions by kind of case."""
    lines = [
        "| | better, accepted | better, refused | even, accepted | even, refused | worse, accepted | worse, refused |"
    ]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for name, wanted in {
        "whole domains": lambda row: "inductive" in row.case and row.model in JUDGED,
        "long tails": lambda row: "imbalance" in row.case,
        "a quarter of the classes": lambda row: "few" in row.case,
        "broken models": lambda row: row.model not in JUDGED,
    }.items():
        lines.append(f"| {name} | {summary(found, wanted)} |")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("domains", nargs="+", type=Path)
    options.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="of training")
    options.add_argument("--draws", type=int, default=3, help="of each variant")
    options.add_argument("--subsets", type=int, default=0, help="of each domain, instead of its variants")
    options.add_argument("--quick", action="store_true", help="one draw, 160 steps")
    options.add_argument("--store", help="instead of the domains' own")
    chosen = options.parse_args()
    if chosen.quick:
        chosen.draws, chosen.steps = 1, 160
    torch.set_num_threads(1)
    found: list[Row] = []
    for path in chosen.domains:
        domain = opened(path, chosen.store)
        if chosen.subsets:
            ((_, (whole,)),) = build(domain, [], False, ["transductive"], steps=chosen.steps)
            drawn = [("subset", [subset(whole, seed) for seed in range(chosen.subsets)])]
        else:
            drawn = build(domain, [IMBALANCE], True, ["inductive"], chosen.draws, chosen.steps)
        for kind, cases in drawn:
            for number, case in enumerate(cases):
                for row in rows(f"{domain.name} {kind} {number}", case, kind == "inductive"):
                    found.append(row)
                    said = {None: "zero-shot", True: "accepted", False: "refused"}[row.accepted]
                    sys.stderr.write(f"{row.case}: {row.model} {100 * row.gain:+.1f} {said}\n")
    if chosen.subsets:
        sys.stdout.write(verdicts(found) + "\n")
        for model in JUDGED:
            sys.stdout.write(f"\n{model}\n{verdicts([row for row in found if row.model == model])}\n")
    else:
        sys.stdout.write(f"{table(found)}\n\n{ranking(found)}\n")


if __name__ == "__main__":
    main()
