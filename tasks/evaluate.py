"""evaluate: tuned models against labels, if there are any; label-free statistics always.

The only stage that opens the labels, and nothing comes after it but the report.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from models import clip, metrics
from models.metrics import Predictions
from models.settings import Method
from storage.artifacts import ArtifactWriter
from storage.errors import DataError
from storage.shards import read_index
from storage.tables import parquet
from tasks.domain import Domain
from tasks.features import centred, read_features
from tasks.stage import StageResult, open_store, run_stage
from tasks.tables import digest_of_table, read_by_path
from tasks.tune import read_tuned, tuned_features

VERSION = 1
FLOOR = 1e-300
"""A probability of 0 has a logarithm all the same."""


def evaluate(
    domain: Domain, shards: StageResult, embedded: StageResult, trained_on: StageResult, tuned: StageResult
) -> StageResult:
    """Zero-shot, plain and centred, and every adapted model on the same images.

    Args:
        shards, embedded: the images to evaluate on.
        trained_on: features of the training images, whose mean is the centre (a test image is never averaged over).
        tuned: the adapted models, of each method one for each seed.

    Files: ``metrics.json`` and ``predictions.parquet`` (one row for each image, columns for each method).

    Raises:
        DataError: labels are unreadable, name unknown classes, or fit no image.
    """
    store = open_store(domain)
    labels_digest = digest_of_table(domain.evaluation.labels) if domain.evaluation else None
    inputs = {
        "shards": shards.ref.digest,
        "embed": embedded.ref.digest,
        "trained_on": trained_on.ref.digest,
        "tune": tuned.ref.digest,
        "labels": labels_digest,
        "classes": domain.classes,
        "method": domain.method,
        "seeds": domain.seeds,
    }

    def body(writer: ArtifactWriter) -> Mapping[str, int]:
        images, models = store.open(shards.ref), store.open(tuned.ref)
        found, train = read_features(store.open(embedded.ref)), read_features(store.open(trained_on.ref))
        index = read_index(images).filter(pl.col("key").is_in(found.keys))
        paths = dict(index.select("key", "path").iter_rows())
        truth = read_truth(domain, [paths[key] for key in found.keys])
        text, scale = found.class_features, read_tuned(models, domain.method[0], domain.seeds[0]).scale
        is_own = embedded.ref == trained_on.ref

        def answers(method: Method, seed: int | None) -> Predictions:
            model = read_tuned(models, method, seed)
            if is_own and model.assignments is not None:
                return metrics.ranked(np.log(np.maximum(model.assignments, FLOOR, dtype=np.float64)))
            return metrics.predict(tuned_features(domain, model, images, found), model.prototypes, model.scale)

        said: dict[str, list[Predictions]] = {
            "zero_shot_plain": [metrics.predict(found.features, text, scale)],
            "zero_shot_centred": [metrics.predict(centred(found.embeds, train.centre), text, scale)],
        }
        for method in domain.method:
            said[method] = [answers(method, seed) for seed in domain.seeds_of(method)]
        report = _metrics(domain, said, truth, is_centred=clip.is_centred(domain.clip))
        table = _table(found.keys, [paths[key] for key in found.keys], truth, said)
        writer.put(
            "evaluation",
            inputs,
            {"metrics.json": json.dumps(report, indent=2).encode(), "predictions.parquet": parquet(table)},
            rows=table.height,
        )
        return {"images": len(found.keys), "labelled": int((truth >= 0).sum())}

    return run_stage(store, domain, "evaluate", VERSION, inputs, body)


def read_truth(domain: Domain, paths: Sequence[str]) -> np.ndarray:
    """Class number of each image, -1 where it has no label."""
    if domain.evaluation is None:
        return np.full(len(paths), -1)
    sources = domain.evaluation.source or domain.source
    labels = read_by_path(domain.evaluation.labels, "class", sources, paths)
    numbers = {domain.prompt_name(name): number for number, name in enumerate(domain.classes)}
    unknown = Counter(name for name in labels.values() if domain.prompt_name(name) not in numbers)
    if unknown:
        lines = []
        for name, count in unknown.most_common(5):
            near = difflib.get_close_matches(name, domain.classes, 1)
            lines.append(f"{name!r} ({count} images)" + (f", did you mean {near[0]!r}?" if near else ""))
        raise DataError(
            f"labels {domain.evaluation.labels!r} name {len(unknown)} class(es) that are not in `classes`: "
            f"{'; '.join(lines)}"
        )
    return np.array([numbers[domain.prompt_name(labels[path])] if path in labels else -1 for path in paths])


def _metrics(
    domain: Domain, said: Mapping[str, Sequence[Predictions]], truth: np.ndarray, *, is_centred: bool
) -> dict[str, Any]:
    labelled = truth >= 0
    n, classes = int(labelled.sum()), len(domain.classes)
    report: dict[str, Any] = {"domain": domain.name, "n_test": n, "classes": domain.classes, "centred": is_centred}
    scores = {name: _score(runs, truth[labelled], labelled) for name, runs in said.items()} if n else {}
    plain, middle = (scores.get(name, {}).get("top1") for name in ("zero_shot_plain", "zero_shot_centred"))
    better = "zero_shot_centred" if (middle or 0.0) > (plain or 0.0) or (not n and is_centred) else "zero_shot_plain"
    report["zero_shot"] = {
        "plain": plain,
        "centred": middle,
        "top1": scores.get(better, {}).get("top1"),
        "better": better,
    }
    report["zero_shot"]["methods"] = {name: scores[name] for name in ("zero_shot_plain", "zero_shot_centred") if n}
    report["methods"] = {}
    for name in domain.method:
        entry = scores.get(name, {"top1": None, "interval": None})
        if n:
            gain = _correct(said[name], truth[labelled], labelled) - _correct(said[better], truth[labelled], labelled)
            entry = entry | {"gain": float(gain.mean()), "gain_interval": metrics.bootstrap_interval(gain)}
        report["methods"][name] = entry | {"label_free": _label_free(said[better][0], said[name][0], classes)}
    report["label_free"] = report["methods"][domain.method[0]]["label_free"]
    if n:
        report["confusion"] = {
            name: metrics.confusion(said[name][0].labels[labelled], truth[labelled], classes).tolist()
            for name in (better, domain.method[0])
        }
    return report


def _label_free(before: Predictions, after: Predictions, classes: int) -> dict[str, Any]:
    """What adapting changed, told without labels."""
    return {
        "agreement": float((before.labels == after.labels).mean()),
        "margin_before": float(before.margin.mean()),
        "margin_after": float(after.margin.mean()),
        "entropy_before": float(before.entropy.mean()),
        "entropy_after": float(after.entropy.mean()),
        "predicted_before": np.bincount(before.labels, minlength=classes).tolist(),
        "predicted_after": np.bincount(after.labels, minlength=classes).tolist(),
    }


def _correct(runs: Sequence[Predictions], truth: np.ndarray, labelled: np.ndarray, k: int = 1) -> np.ndarray:
    """Share of the seeds that are right about each labelled image, ``(n,)``."""
    return np.mean([metrics.hits(run.ranked[labelled], truth, k) for run in runs], axis=0)


def _score(runs: Sequence[Predictions], truth: np.ndarray, labelled: np.ndarray) -> dict[str, Any]:
    correct = _correct(runs, truth, labelled)
    seeds = [float(metrics.hits(run.ranked[labelled], truth, 1).mean()) for run in runs]
    return {
        "top1": float(correct.mean()),
        "interval": metrics.bootstrap_interval(correct),
        "top5": float(_correct(runs, truth, labelled, 5).mean()),
        "mean_per_class": metrics.mean_per_class(correct, truth),
        "seeds": seeds,
        "per_class": {
            str(label): {"n": int((truth == label).sum()), "top1": float(correct[truth == label].mean())}
            for label in np.unique(truth)
        },
    }


def _table(
    keys: Sequence[str], paths: Sequence[str], truth: np.ndarray, said: Mapping[str, Sequence[Predictions]]
) -> pl.DataFrame:
    columns: dict[str, Any] = {"key": keys, "path": paths, "truth": pl.Series(truth).replace(-1, None)}
    for name, runs in said.items():
        columns[name] = runs[0].labels
        columns[f"{name}_probability"] = runs[0].probabilities[:, 0]
        columns[f"{name}_seeds"] = np.stack([run.labels for run in runs], axis=1).tolist()
    return pl.DataFrame(columns)
