"""Generated domains with known labels, on which what sees no label was chosen.

    python -m benchmarks.synthetic [--problems 200] [--first 0] [--fit | --texts]

A problem is what the product sees of a domain: image embeds, unit class texts, texts about images, the CLIP's scale.
Its shape is drawn from the seed: number of classes, images a class, overlap of classes, look-alikes, how wrong the
texts are and for how many of the images they say anything, tails and absent classes. No real domain has a part in it;
the ranges were set so that a few figures that need no label (spread of logits, spectrum, share of classes that
zero-shot uses) lie around those of the domains that the project has.

The first table has what each zero-shot and method gains on unseen images over the better of plain and domain-centred
zero-shot, and how often it loses more than a point, by the proportions of the classes; then what the gate lets pass. A
model is *better* or *worse* by more than a point. `--fit` says which SHARE and BAR of `models.judge.selection` these
problems ask for. `--texts` shows instead what texts about the images bring by `beliefs` of latteclip_plus, and what the
gate lets pass that hears them, by kind of text (`Written`).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from scipy.stats import beta
from torch import Tensor

from benchmarks.accuracy import heard
from latteflow.models.judge import selection
from latteflow.models.judge.halves import halves
from latteflow.models.judge.selection import ERRORS, Duel, Evidence, duel, estimates, judge, kappa, neighbours
from latteflow.models.judge.shift import centre_share
from latteflow.models.methods.adaptation import Adapted, TuneData
from latteflow.models.methods.latteclip import LatteClipSettings
from latteflow.models.methods.latteclip_plus.beliefs import beliefs
from latteflow.models.methods.registry import adapt
from latteflow.models.methods.transduction import TransductionSettings
from latteflow.models.methods.transduction.tuning import transduce
from latteflow.models.vectors import unit

DIM = 256
SCALE = 40.0
MOST_IMAGES = 1200
STEPS = 60
"""Of LatteCLIP's training, a tenth of the default's."""
EVEN = 0.01
MOST_FALSE = 0.02
"""Share of the worse models that `--fit` lets pass, so that the interval ends below 5 percent."""
Written = Literal["independent", "of other images", "all the same", "half zero-shot's", "zero-shot's", "tags"]
"""Texts that know an image's class in a share of the cases, and else are wrong by themselves or as zero-shot is; that
belong to another image; that say one thing of all; that say zero-shot's class; that name the nearest of some words."""
Proportions = Literal["even", "uneven", "tail 10", "tail 50", "a quarter"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is drawn of a problem, before its images are.

    Attributes:
        classes: 5 to 100, log-uniform.
        images: of an average class, 2 to 100.
        kinds: super-classes; classes of one kind lie close together.
        separation: distance of classes in units of the spread of their images.
        modes: look-alikes of which a class consists.
        of_kind, of_class: how well a text knows the kind, and the class within the kind; cosines, 0 to 1.
        offset: how unevenly what all images share leans to the classes' texts.
        proportions: of the classes.
        texts: how well a text about an image knows its class, 0 to 1; 0: it belongs to another image.
    """

    classes: int
    images: int
    kinds: int
    separation: float
    modes: int
    of_kind: float
    of_class: float
    offset: float
    proportions: Proportions
    texts: float

    @classmethod
    def draw(cls, seed: int) -> Shape:
        """The shape of a seed."""
        rng = np.random.default_rng([seed, 0])
        classes = round(np.exp(rng.uniform(np.log(5), np.log(100))))
        kinds: tuple[Proportions, ...] = ("even", "uneven", "tail 10", "tail 50", "a quarter")
        drawn = kinds[rng.integers(len(kinds))]
        return cls(
            classes=classes,
            images=round(np.exp(rng.uniform(np.log(2), np.log(100)))),
            kinds=max(1, round(classes / rng.uniform(1, 8))),
            separation=np.exp(rng.uniform(np.log(0.25), np.log(1.5))),
            modes=int(rng.integers(1, 9)),
            of_kind=rng.uniform(0.0, 0.9),
            of_class=rng.uniform(0.0, 0.7),
            offset=rng.uniform(0, 0.6),
            proportions=drawn,
            texts=rng.choice([0.0, rng.uniform(0, 1)]),
        )


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A generated domain, adapted to and tested on unseen images of the same classes.

    Attributes:
        embeds, test_embeds: `(n, dim)`, `(m, dim)`, not unit rows.
        test_truth: `(m,)` int64.
        class_texts: unit rows, `(classes, dim)`.
        texts: unit text features about the images, `(n, dim)`; has_text: `(n,)` bool.
        written: unit text features about the images, by who wrote them, `(n, dim)`.
    """

    shape: Shape
    embeds: Tensor
    test_embeds: Tensor
    test_truth: Tensor
    class_texts: Tensor
    texts: Tensor
    has_text: Tensor
    written: Mapping[Written, Tensor]
    scale: float = SCALE


def problem(seed: int) -> Problem:
    """The problem of a seed: the same numbers on every machine up to rounding."""
    shape = Shape.draw(seed)
    rng = np.random.default_rng([seed, 1])
    basis = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0]
    power = rng.uniform(0.2, 0.6)
    spread = np.arange(1, DIM + 1) ** -power
    seen = basis * (spread / np.linalg.norm(spread))  # columns: directions in which classes and images differ

    def vectors(*size: int) -> np.ndarray:
        return rng.normal(size=(*size, DIM)) @ seen.T

    kind_of = rng.integers(shape.kinds, size=shape.classes)
    kinds, own = vectors(shape.kinds), vectors(shape.classes)
    means = shape.separation * (kinds[kind_of] + own) / np.sqrt(2)
    # Nuisance varies along directions of its own, which those of the classes are turned into.
    flipped = basis @ np.diag(rng.choice([-1, 1], DIM))
    turned = np.linalg.qr(flipped + 0.7 * rng.normal(size=(DIM, DIM)) / np.sqrt(DIM))[0]
    nuisance = turned * (spread / np.linalg.norm(spread))
    look = vectors(shape.classes, shape.modes) * rng.uniform(0.3, 1.0)
    base = vectors() * rng.uniform(0.5, 2.0)

    weights = _proportions(shape, rng)

    def images(count: int) -> tuple[np.ndarray, np.ndarray]:
        truth = rng.choice(shape.classes, size=count, p=weights)
        mode = rng.integers(shape.modes, size=count)
        tail = np.sqrt(5 / rng.chisquare(5, size=(count, 1)))
        noise = rng.normal(size=(count, DIM)) @ nuisance.T * tail
        return base + means[truth] + look[truth, mode] + noise, truth

    n = min(MOST_IMAGES, shape.classes * shape.images)
    embeds, truth = images(n)
    test_embeds, test_truth = images(max(500, n // 2))

    error = vectors(shape.classes), vectors(shape.kinds)
    known = (
        shape.of_kind * kinds[kind_of]
        + np.sqrt(1 - shape.of_kind**2) * error[1][kind_of]
        + shape.of_class * own
        + np.sqrt(1 - shape.of_class**2) * error[0]
    ) / np.sqrt(2)
    # What all images share pulls towards some classes, in units of what tells classes apart.
    shared = base / np.linalg.norm(base)
    pull = shape.offset * shape.separation / np.linalg.norm(base) * rng.normal(size=(shape.classes, 1))
    class_texts = known + (0.5 * pull - known @ shared[:, None]) * shared + vectors() * rng.uniform(0, 1)
    # Most of a text's feature lies where no image is.
    apart = rng.normal(size=class_texts.shape) / np.sqrt(DIM)
    class_texts += apart * rng.uniform(1, 4)

    right = rng.random(n) < shape.texts
    about = np.where(right, truth, rng.choice(shape.classes, size=n, p=weights))
    texts = means[about] / shape.separation + vectors(n) * rng.uniform(0.3, 1.5) + (class_texts - known).mean(0)
    found = {
        "embeds": embeds, "test_embeds": test_embeds, "test_truth": test_truth,
        "class_texts": class_texts, "texts": texts, "has_text": rng.random(n) < rng.uniform(0.3, 1.0),
    }  # fmt: skip
    tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in found.items()}
    tensors |= {name: tensor.float() for name, tensor in tensors.items() if tensor.dtype == torch.float64}
    for name in ("class_texts", "texts"):
        tensors[name] = unit(tensors[name])
    words = _words(np.random.default_rng([seed, 3]), shape, seen, kinds, own, kind_of, apart)
    written = _written(np.random.default_rng([seed, 2]), truth, kind_of, embeds, class_texts, words)
    features = {name: unit(torch.from_numpy(value).float()) for name, value in written.items()}
    return Problem(shape=shape, written=features, **tensors)


def _words(
    rng: np.random.Generator,
    shape: Shape,
    seen: np.ndarray,
    kinds: np.ndarray,
    own: np.ndarray,
    kind_of: np.ndarray,
    apart: np.ndarray,
) -> np.ndarray:
    """Text features of 50 to 500 words, each akin to a class, as wrong as class texts are, `(words, dim)`."""
    near = rng.integers(shape.classes, size=rng.integers(50, 500))

    def vectors() -> np.ndarray:
        return rng.normal(size=(len(near), DIM)) @ seen.T

    akin, alike = rng.uniform(0.2, 0.8), rng.uniform(0, 0.9)
    word = (akin * (kinds[kind_of[near]] + own[near]) + np.sqrt(1 - akin**2) * vectors()) / np.sqrt(2)
    known = shape.of_kind * word + np.sqrt(1 - shape.of_kind**2) * vectors()
    other = rng.normal(size=known.shape) / np.sqrt(DIM)
    return known + 2.5 * (alike * apart[near] + np.sqrt(1 - alike**2) * other)


def _written(
    rng: np.random.Generator,
    truth: np.ndarray,
    kind_of: np.ndarray,
    embeds: np.ndarray,
    class_texts: np.ndarray,
    words: np.ndarray,
) -> dict[Written, np.ndarray]:
    """Text features of the images, `(n, dim)`, by who wrote them."""
    n, classes = len(truth), len(class_texts)
    share, noise = rng.uniform(0.1, 1), rng.uniform(0.2, 1.2)

    def direction(rows: np.ndarray) -> np.ndarray:
        centred = rows - rows.mean(0)
        return centred / np.linalg.norm(centred, axis=1, keepdims=True)

    length = np.linalg.norm(class_texts - class_texts.mean(0), axis=1).mean()
    images = direction(embeds)

    def about(labels: np.ndarray) -> np.ndarray:
        return class_texts[labels] + noise * length * rng.normal(size=(n, DIM)) / np.sqrt(DIM)

    of_kind = [np.flatnonzero(kind_of == kind_of[label]) for label in range(classes)]
    alike = np.array([rng.choice(of_kind[label]) for label in truth])
    wrong = np.where(rng.random(n) < 0.5, alike, rng.choice(classes, size=n))
    zero_shot = (images @ direction(class_texts).T).argmax(1)
    independent = about(np.where(rng.random(n) < share, truth, wrong))
    return {
        "independent": independent,
        "of other images": independent[rng.permutation(n)],
        "all the same": class_texts.mean(0) + 0.1 * length * rng.normal(size=(n, DIM)) / np.sqrt(DIM),
        "half zero-shot's": about(np.where(rng.random(n) < share, truth, zero_shot)),
        "zero-shot's": about(zero_shot),
        "tags": words[(images @ direction(words).T).argmax(1)],
    }


def _proportions(shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """Of the classes, in a random order, `(classes,)`."""
    ranks = rng.permutation(shape.classes) / max(1, shape.classes - 1)
    shares = {
        "even": np.ones(shape.classes),
        "uneven": rng.gamma(1.0, size=shape.classes) + 0.05,
        "tail 10": 10.0**-ranks,
        "tail 50": 50.0**-ranks,
        "a quarter": (ranks <= max(0.25, 1 / max(1, shape.classes - 1))).astype(float),
    }[shape.proportions]
    return shares / shares.sum()


def kind_of(gain: float) -> str:
    """What a model is against the better zero-shot, by its gain in top-1."""
    return "better" if gain > EVEN else "worse" if gain < -EVEN else "even"


@dataclass(frozen=True)
class Row:
    """One model of a problem; zero-shots have no verdict."""

    problem: Problem
    model: str
    gain: float
    above_chance: float
    evidence: Evidence
    share: float
    accepted: bool | None = None

    @property
    def kind(self) -> str:
        return kind_of(self.gain)


def rows(found: Problem) -> Iterator[Row]:
    """The zero-shots and models of a problem, scored on unseen images and judged on those they were adapted to."""
    share = centre_share(found.embeds, found.class_texts, found.scale)
    mean = found.embeds.mean(0)
    shift = share * mean
    x, test = unit(found.embeds - shift), unit(found.test_embeds - shift)
    own, near = (x @ found.class_texts.T).argmax(1), neighbours(x)

    def top1(features: Tensor, classifier: Tensor) -> float:
        return float(((features @ classifier.T).argmax(1) == found.test_truth).double().mean())

    spaces = {"plain": unit(found.test_embeds), "centred": unit(found.test_embeds - mean), "estimated": test}
    zero_shots = {name: top1(space, found.class_texts) for name, space in spaces.items()}
    before = max(zero_shots["plain"], zero_shots["centred"])
    above = before - 1 / len(found.class_texts)
    for name, value in zero_shots.items():
        yield Row(found, f"zero-shot, {name}", value - before, above, Evidence(math.nan, Duel(0, 0)), share)

    def data(texts: Tensor) -> TuneData:
        return TuneData(
            pseudo_labels=(x @ texts.T).argmax(1),
            class_texts=texts,
            image_embeds=found.embeds,
            centre=shift,
            image_texts=found.texts,
            has_image_text=found.has_text,
        )

    right, wrong = data(found.class_texts), data(found.class_texts.roll(1, 0))
    cfg, settings = LatteClipSettings(), TransductionSettings()
    cfg = LatteClipSettings(epochs=math.ceil(STEPS / cfg.n_steps(len(x))))
    for name, method, given in (
        ("transduction", "transduction", right),
        ("latteclip", "latteclip", right),
        ("wrong names", "transduction", wrong),
    ):
        model: Adapted = adapt(method, given, cfg, settings, scale=found.scale)  # type: ignore[arg-type]
        mapped = [y if model.image_map is None else unit(y @ model.image_map) for y in (x, test)]
        said = (model.scale * mapped[0] @ model.prototypes.T).softmax(1)
        evidence = Evidence(estimates(said, own, near)["vouched"], duel(x, said.argmax(1), own))
        gain = top1(mapped[1], model.prototypes) - before
        yield Row(found, name, gain, above, evidence, share, judge([evidence], share).accepted)


def interval(hits: int, n: int) -> str:
    """A share in percent with its 95 % interval (Clopper and Pearson)."""
    low = beta.ppf(0.025, hits, n - hits + 1) if hits else 0.0
    high = beta.ppf(0.975, hits + 1, n - hits) if hits < n else 1.0
    return f"{hits} of {n}, {100 * hits / max(n, 1):.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def gains(found: Sequence[Row]) -> str:
    """A line for each zero-shot and method: mean gain in points, and how often it loses more than a point."""
    kinds = list(dict.fromkeys(row.problem.shape.proportions for row in found))
    lines = ["| | " + " | ".join(kinds) + " | all |", "| --- |" + " --- |" * (len(kinds) + 1)]
    for model in dict.fromkeys(row.model for row in found):
        cells = []
        for chosen in (*([kind] for kind in kinds), kinds):
            values = [row.gain for row in found if row.model == model and row.problem.shape.proportions in chosen]
            cells.append(f"{100 * np.mean(values):+.1f}, {100 * np.mean(np.array(values) < -EVEN):.0f} %")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


class Judged(Protocol):
    """A model, what the gate said of it (None: it was not asked), and the truth."""

    @property
    def kind(self) -> str: ...
    @property
    def accepted(self) -> bool | None: ...
    @property
    def above_chance(self) -> float: ...


def verdicts(found: Sequence[Judged]) -> str:
    """What the gate lets pass."""
    judged = [row for row in found if row.accepted is not None]
    counts = {kind: [row for row in judged if row.kind == kind] for kind in ("better", "even", "worse")}
    lines = [
        f"{kind}: accepted {interval(sum(bool(r.accepted) for r in of), len(of))}" for kind, of in counts.items() if of
    ]
    passed = [row for row in judged if row.accepted]
    lines.append(f"of those accepted worse: {interval(sum(row.kind == 'worse' for row in passed), len(passed))}")
    near = [row for row in judged if row.above_chance < 0.03]
    lines.append(
        f"zero-shot within 3 points of chance: accepted {interval(sum(bool(r.accepted) for r in near), len(near))}"
    )
    return "\n".join(lines)


def fitted(found: Sequence[Row]) -> str:
    """SHARE in steps of 0.1, and BAR, that let the most better models pass and at most MOST_FALSE of the worse."""
    judged = [row for row in found if row.accepted is not None]
    vouched, share = np.array([[row.evidence.vouched, row.share] for row in judged]).T
    won = np.array([row.evidence.duel.score > ERRORS * row.evidence.duel.error for row in judged])
    better, worse = (np.array([row.kind == kind for row in judged]) for kind in ("better", "worse"))
    tried = []
    for weight in np.arange(0, 0.51, 0.1):
        scores = np.where(won, vouched + weight * share, -np.inf)
        bar = np.sort(scores[worse])[::-1][int(MOST_FALSE * worse.sum())]
        tried.append(((scores[better] > bar).mean(), weight, bar))
    power, weight, bar = max(tried)
    return f"SHARE {weight:.1f}, BAR {bar:.3f} ({power:.0%} of the better accepted)"


@dataclass(frozen=True)
class Told:
    """What texts of a kind came to in a problem.

    Attributes:
        count: they are worth something.
        more: what they add to transduction's accuracy on unseen images.
        gain: of transduction with them over the better zero-shot.
        accepted: by the gate, which hears them where they count.
    """

    count: bool
    more: float
    gain: float
    accepted: bool

    @property
    def kind(self) -> str:
        return kind_of(self.gain)


def of_texts(found: Problem) -> dict[Written, Told]:
    """By who wrote the texts, what they come to."""
    shift = (share := centre_share(found.embeds, found.class_texts, found.scale)) * found.embeds.mean(0)
    x, test = unit(found.embeds - shift), unit(found.test_embeds - shift)
    own, near = (x @ found.class_texts.T).argmax(1), neighbours(x)
    cfg = TransductionSettings()

    def top1(features: Tensor, classifier: Tensor) -> float:
        return float(((features @ classifier.T).argmax(1) == found.test_truth).double().mean())

    def adapted(data: TuneData) -> Adapted:
        y, said = data.image_features, None
        if data.image_texts is not None:
            texts = data.image_texts, data.has_image_text
            said = beliefs(y, found.class_texts, *texts, found.scale, cfg.neighbours).logits
        return Adapted(prototypes=transduce(cfg, y, found.class_texts, found.scale, said).prototypes, scale=found.scale)

    def judged(data: TuneData) -> Told:
        model, weighed = adapted(data), data.image_texts is not None
        labels = (x @ model.prototypes.T).argmax(1)
        evidence = Evidence(kappa(labels, own[near], len(found.class_texts)), duel(x, labels, own))
        told = heard(data, labels, found.scale, halves(data, adapted)) if weighed else None
        gain = top1(test, model.prototypes) - before
        more = gain - without.gain if weighed else 0.0
        return Told(told is not None, more, gain, judge([evidence], share, told).accepted)

    mean = found.embeds.mean(0)
    before = max(top1(unit(found.test_embeds - centre), found.class_texts) for centre in (0 * mean, mean))
    bare = TuneData(pseudo_labels=own, class_texts=found.class_texts, image_embeds=found.embeds, centre=shift)
    without = judged(bare)
    return {
        kind: judged(replace(bare, image_texts=texts, has_image_text=found.has_text, independent_texts=True))
        for kind, texts in found.written.items()
    }


def worths(found: Sequence[Mapping[Written, Told]]) -> str:
    """A line for each kind of text: how often it counts, what it adds; of models with texts that count, what passes."""
    lines = [
        "| texts | count | gain over none | loss of more than a point | better, accepted | even | worse |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind in found[0]:
        told = [answers[kind] for answers in found]
        more = np.array([each.more for each in told])
        cells = [f"{np.mean([e.count for e in told]):.0%}", f"{100 * more.mean():+.1f}", f"{(more < -EVEN).mean():.0%}"]
        for which in ("better", "even", "worse"):
            of = [each.accepted for each in told if each.count and each.kind == which]
            cells.append(interval(sum(of), len(of)) if of else "none")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--problems", type=int, default=200)
    options.add_argument("--first", type=int, default=0, help="seed")
    options.add_argument("--fit", action="store_true")
    options.add_argument("--texts", action="store_true", help="what texts about the images bring")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    if chosen.texts:
        seeds = range(chosen.first, chosen.first + chosen.problems)
        sys.stdout.write(f"{worths([of_texts(problem(seed)) for seed in seeds])}\n")
        return
    found: list[Row] = []
    for seed in range(chosen.first, chosen.first + chosen.problems):
        found += rows(problem(seed))
        sys.stderr.write(f"{seed} {found[-1].problem.shape}\n")
    sys.stdout.write(f"{gains(found)}\n\n{verdicts(found)}\n")
    if chosen.fit:
        sys.stdout.write(f"{fitted(found)}; in use are SHARE {selection.SHARE}, BAR {selection.BAR}\n")


if __name__ == "__main__":
    main()
