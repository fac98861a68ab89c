"""evaluate: tuned models against labels, if there are any; label-free statistics always.

The only stage that opens the labels, and nothing comes after it but the report.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from latteflow.models.judge import metrics
from latteflow.models.judge.few_labels import LABELS, few_labels, worth
from latteflow.models.judge.metrics import Predictions
from latteflow.models.settings import ZERO_SHOTS, own_zero_shot
from latteflow.storage.artifacts import Artifact, ArtifactWriter
from latteflow.storage.shards import overlap, read_index
from latteflow.storage.tables import parquet
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.features import Features, centred, read_features
from latteflow.tasks.core.stage import StageResult, open_store, run_stage
from latteflow.tasks.report import scores as figures
from latteflow.tasks.report.forgetting import general_answers
from latteflow.tasks.report.labels import digest_of_labels, read_truth
from latteflow.tasks.report.slices import Slice, slices
from latteflow.tasks.tune.models import read_tuned, tuned_features

VERSION = 3
FLOOR = 1e-300
"""A probability of 0 has a logarithm all the same."""
CONFUSED = 12
"""Pairs of classes of which images are named, of each method."""
CONFUSED_IMAGES = 4


class Head(NamedTuple):
    """A classifier and what it reads: logits are ``scale * features @ weights.T``."""

    features: np.ndarray
    weights: np.ndarray
    scale: float


@dataclass(frozen=True)
class Answers:
    """What the models of one method say, one entry for each seed.

    Attributes:
        runs: of the models as they are.
        temperatures: what their logits are divided by to match what is expected without labels.
        matched: confidence in the best class after that, ``(n,)`` each.
    """

    runs: Sequence[Predictions]
    temperatures: Sequence[float]
    matched: Sequence[np.ndarray]

    def right(self, truth: np.ndarray, labelled: np.ndarray, k: int = 1) -> np.ndarray:
        """Share of the seeds that are right about each labelled image, ``(n,)``."""
        return np.mean([metrics.hits(run.ranked[labelled], truth, k) for run in self.runs], axis=0)


def evaluate(
    domain: Domain,
    shards: StageResult,
    embedded: StageResult,
    adapted_to: StageResult,
    trained_on: StageResult,
    tuned: StageResult,
    *general: StageResult,
) -> StageResult:
    """Zero-shot, plain and centred, and every adapted model on the same images.

    Args:
        shards, embedded: the images to evaluate on.
        adapted_to: the training images.
        trained_on: their features, whose mean is the centre (a test image is never averaged over).
        tuned: the adapted models, of each method one for each seed.
        general: shards and features of ``evaluation.general``, if there is one.

    Files: ``metrics.json`` and ``predictions.parquet`` (one row for each image, columns for each method).

    Raises:
        DataError: labels are unreadable, name unknown classes, or fit no image.
    """
    store = open_store(domain)
    inputs: dict[str, Any] = {
        "shards": shards.ref.digest,
        "embed": embedded.ref.digest,
        "adapted_to": adapted_to.ref.digest,
        "trained_on": trained_on.ref.digest,
        "tune": tuned.ref.digest,
        "labels": digest_of_labels(domain),
        "few_labels": bool(domain.evaluation and domain.evaluation.few_labels),
        "classes": domain.classes,
        "method": domain.method,
        "seeds": domain.seeds,
    }
    if general:
        inputs["general"] = {"embed": general[1].ref.digest, "labels": digest_of_labels(domain.of_split("general"))}

    def body(writer: ArtifactWriter) -> Mapping[str, int]:
        images, models = store.open(shards.ref), store.open(tuned.ref)
        found, train = read_features(store.open(embedded.ref)), read_features(store.open(trained_on.ref))
        index = read_index(images).filter(pl.col("key").is_in(found.keys))
        paths = dict(index.select("key", "path").iter_rows())
        truth = read_truth(domain, [paths[key] for key in found.keys])
        is_own = embedded.ref == trained_on.ref
        middle = centred(found.embeds, train.centre)
        said = _said(domain, models, images, found, train, is_own=is_own)
        labelled = np.flatnonzero(truth >= 0)
        known_before = set(overlap(store.open(adapted_to.ref), images)["key"])
        n_seen = sum(found.keys[row] in known_before for row in labelled)
        scores = _scores(domain, said, truth, labelled, found.keys, share=train.share, n_seen=n_seen)
        more: dict[str, Any] = {}
        if len(labelled):
            keys, known = [found.keys[row] for row in labelled], truth[labelled]
            before = None if is_own else centred(train.embeds, train.centre)
            more["slices"] = _slices(slices(images, keys, middle[labelled], before), said, known, labelled)
            if inputs["few_labels"] and len(labelled) > 1:  # one half to learn from, one to be tested on
                more["few_labels"] = _few_labels(scores, few_labels(middle[labelled], known))
        if general:
            more["general"] = _forgotten(domain, models, *(store.open(each.ref) for each in general))
        table = _table(found.keys, [paths[key] for key in found.keys], truth, said)
        files = {"metrics.json": scores.model_copy(update=more).written(), "predictions.parquet": parquet(table)}
        writer.put("evaluation", inputs, files, rows=table.height)
        return {"images": len(found.keys), "labelled": len(labelled)}

    return run_stage(store, domain, "evaluate", VERSION, inputs, body)


def _said(
    domain: Domain, models: Artifact, images: Artifact, found: Features, train: Features, *, is_own: bool
) -> dict[str, Answers]:
    """What the zero-shots and every method say of images.

    Args:
        found, train: features of these images, and of those that the models were adapted to.
        is_own: they are the same.
    """
    text, scale = found.class_features, read_tuned(models, domain.method[0], domain.seeds[0]).scale

    def head(method: str, seed: int | None) -> Head:
        model = read_tuned(models, method, seed)
        if is_own and model.assignments is not None:
            logits = np.log(np.maximum(model.assignments, FLOOR, dtype=np.float64))
            return Head(logits, np.eye(len(domain.classes)), 1.0)
        return Head(tuned_features(domain, model, images, found), model.prototypes, model.scale)

    spaces = (found.features, centred(found.embeds, train.centre), centred(found.embeds, train.shift))
    heads = {name: Head(space, text, scale) for name, space in zip(ZERO_SHOTS, spaces, strict=True)}
    labels = {name: metrics.predict(*each).labels for name, each in heads.items()}
    # The one that each is less like.
    others = ("zero_shot_centred", "zero_shot_plain", ZERO_SHOTS[train.share <= 0.5])
    said = {name: answers([each], labels[other]) for (name, each), other in zip(heads.items(), others, strict=True)}
    own = labels[own_zero_shot(domain.clip.centre)]
    for method in domain.method:
        said[method] = answers((head(method, seed) for seed in domain.seeds_of(method)), own)
    return said


def answers(heads: Iterable[Head], other: np.ndarray) -> Answers:
    """What models say, and how sure they are once their mean confidence is what is expected of them without labels.

    Expected is the share of images about which a model agrees with another one, which estimates its accuracy (Jiang et
    al., *Assessing Generalization of SGD via Disagreement*, ICLR 2022). There the two are trained apart; here one comes
    from the other, so that the estimate is rough.

    Args:
        other: classes by the other model, ``(n,)``: of an adapted one zero-shot, of plain zero-shot the centred one.
    """
    runs, temperatures, matched = [], [], []
    for head in heads:
        runs.append(metrics.predict(*head))
        temperatures.append(metrics.temperature_for(*head, confidence=float((runs[-1].labels == other).mean())))
        cooler = head._replace(scale=head.scale / temperatures[-1])
        matched.append(metrics.predict(*cooler).probabilities[:, 0])
    return Answers(runs, temperatures, matched)


def _scores(
    domain: Domain,
    said: Mapping[str, Answers],
    truth: np.ndarray,
    labelled: np.ndarray,
    keys: Sequence[str],
    *,
    share: float,
    n_seen: int,
) -> figures.Scores:
    n, classes, known = len(labelled), len(domain.classes), truth[labelled]
    found = {name: _score(each, known, labelled) for name, each in said.items()} if n else {}
    own = own_zero_shot(domain.clip.centre)
    plain, middle, estimated = (found[name].top1 if n else None for name in ZERO_SHOTS)
    better = max(ZERO_SHOTS, key=lambda name: found[name].top1 or 0.0) if n else own
    methods: dict[str, figures.Score] = {}
    for name in domain.method:
        score = figures.Score(top1=None, interval=None)
        if n:
            score = found[name].model_copy(update=_compared(found, said, name, better, known, labelled))
        unlabelled = _label_free(said[better].runs[0], said[name].runs[0], classes)
        methods[name] = score.model_copy(update={"label_free": unlabelled})
    more: dict[str, Any] = {}
    if n:
        first = {name: each.runs[0].labels[labelled] for name, each in said.items()}
        matrices = {name: metrics.confusion(labels, known, classes) for name, labels in first.items()}
        more["confusion"] = {
            name: [[int(i), int(j), int(matrix[i, j])] for i, j in np.argwhere(matrix)]
            for name, matrix in matrices.items()
        }
        more["confused"] = {
            name: _confused(matrix, matrices[better], first[name], known, [keys[row] for row in labelled])
            for name, matrix in matrices.items()
        }
    return figures.Scores(
        format=figures.FORMAT,
        domain=domain.name,
        n_test=n,
        n_seen=n_seen,
        classes=domain.classes,
        centre_share=share,
        zero_shot=figures.ZeroShot(
            plain=plain,
            centred=middle,
            estimated=estimated,
            own=own,
            top1=found[better].top1 if n else None,
            better=better,
            methods={name: found[name] for name in ZERO_SHOTS if n},
        ),
        methods=methods,
        label_free=methods[domain.method[0]].label_free,
        **more,
    )


def _compared(
    scores: Mapping[str, figures.Score],
    said: Mapping[str, Answers],
    method: str,
    better: str,
    truth: np.ndarray,
    labelled: np.ndarray,
) -> dict[str, Any]:
    """What is new in the score of a method beside the better zero-shot, on the same images."""
    pair = [said[name] for name in (better, method)]
    right = [each.right(truth, labelled) for each in pair]
    first = [each.runs[0].labels[labelled] == truth for each in pair]
    was, of_class = scores[better].per_class, scores[method].per_class
    return {
        "per_class": {
            label: each.model_copy(update={"gain": each.top1 - was[label].top1}) for label, each in of_class.items()
        },
        **dict(figures.Gain.of(right, first)),
    }


def _confused(
    matrix: np.ndarray, before: np.ndarray, predicted: np.ndarray, truth: np.ndarray, keys: Sequence[str]
) -> list[figures.Mistake]:
    """The most frequent mistakes of the first seed, each with some of its images."""
    wrong = matrix * ~np.eye(len(matrix), dtype=bool)
    most = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSED]
    pairs = [divmod(int(place), len(matrix)) for place in most if wrong.flat[place]]
    return [
        figures.Mistake(
            truth=true,
            answer=answer,
            n=int(matrix[true, answer]),
            before=int(before[true, answer]),
            keys=[keys[row] for row in np.flatnonzero((truth == true) & (predicted == answer))[:CONFUSED_IMAGES]],
        )
        for true, answer in pairs
    ]


def _slices(
    found: Sequence[Slice], said: Mapping[str, Answers], truth: np.ndarray, labelled: np.ndarray
) -> list[figures.SliceScores]:
    right = {name: each.right(truth, labelled) for name, each in said.items()}
    return [
        figures.SliceScores(
            by=each.by,
            name=each.name,
            n=len(each.rows),
            top1={name: float(values[each.rows].mean()) for name, values in right.items()},
        )
        for each in found
    ]


def _forgotten(domain: Domain, models: Artifact, images: Artifact, embedded: Artifact) -> figures.General:
    """Top-1 on other images before and after, and what changed."""
    found, own = read_features(embedded), domain.of_split("general")
    paths = dict(read_index(images).select("key", "path").iter_rows())
    truth = read_truth(own, [paths[key] for key in found.keys])
    labelled = truth >= 0

    def right(method: str) -> np.ndarray:
        said = (general_answers(domain, models, images, embedded, method, seed) for seed in domain.seeds_of(method))
        return np.mean([(each == truth)[labelled] for each in said], axis=0)

    before = (found.zero_shot == truth)[labelled]
    after = {method: right(method) for method in domain.method}
    return figures.General(
        n=len(before),
        classes=len(own.classes),
        top1=float(before.mean()),
        interval=metrics.bootstrap_interval(before),
        methods={
            name: figures.Forgotten(
                top1=float(own.mean()),
                change=float((own - before).mean()),
                change_interval=metrics.bootstrap_interval(own - before),
            )
            for name, own in after.items()
        },
    )


def _few_labels(scores: figures.Scores, curves: Mapping[str, list[list[float]]]) -> figures.FewLabels:
    reached = {name: worth(curves, score.top1 or 0.0) for name, score in scores.of.items()}
    return figures.FewLabels(labels=LABELS, top1=curves, worth=reached)


def _label_free(before: Predictions, after: Predictions, classes: int) -> figures.LabelFree:
    """What adapting changed, told without labels."""
    return figures.LabelFree(
        agreement=float((before.labels == after.labels).mean()),
        margin_before=float(before.margin.mean()),
        margin_after=float(after.margin.mean()),
        entropy_before=float(before.entropy.mean()),
        entropy_after=float(after.entropy.mean()),
        predicted_before=np.bincount(before.labels, minlength=classes).tolist(),
        predicted_after=np.bincount(after.labels, minlength=classes).tolist(),
    )


def _score(said: Answers, truth: np.ndarray, labelled: np.ndarray) -> figures.Score:
    correct = said.right(truth, labelled)
    answered = [run.labels[labelled] for run in said.runs]
    return figures.Score(
        top1=float(correct.mean()),
        interval=metrics.bootstrap_interval(correct),
        top5=float(said.right(truth, labelled, 5).mean()),
        mean_per_class=metrics.mean_per_class(correct, truth),
        macro_f1=float(np.mean([metrics.macro_f1(labels, truth) for labels in answered])),
        seeds=[float((labels == truth).mean()) for labels in answered],
        calibration=figures.Calibration(
            as_is=_confidence([run.probabilities[labelled, 0] for run in said.runs], answered, truth),
            matched=_confidence([each[labelled] for each in said.matched], answered, truth),
            temperatures=said.temperatures,
        ),
        per_class={
            label: figures.OfClass(n=int((truth == label).sum()), top1=float(correct[truth == label].mean()))
            for label in np.unique(truth).tolist()
        },
    )


def _confidence(
    confidence: Sequence[np.ndarray], answered: Sequence[np.ndarray], truth: np.ndarray
) -> figures.Confidence:
    """Of the answers of all seeds together."""
    correct = np.concatenate([labels == truth for labels in answered])
    bins = metrics.reliability(np.concatenate(confidence), correct)
    return figures.Confidence(
        ece=metrics.calibration_error(bins),
        confidence=float(np.concatenate(confidence).mean()),
        bins=[figures.Bin(**each._asdict()) for each in bins],
    )


def _table(keys: Sequence[str], paths: Sequence[str], truth: np.ndarray, said: Mapping[str, Answers]) -> pl.DataFrame:
    columns: dict[str, Any] = {"key": keys, "path": paths, "truth": pl.Series(truth).replace(-1, None)}
    for name, each in said.items():
        columns[name] = each.runs[0].labels
        columns[f"{name}_probability"] = each.runs[0].probabilities[:, 0]
        columns[f"{name}_seeds"] = np.stack([run.labels for run in each.runs], axis=1).tolist()
    return pl.DataFrame(columns)
