"""Figures of merit, held to scikit-learn, torchmetrics and SciPy."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sklearn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from latteflow.models.judge import metrics
from latteflow.models.judge.few_labels import DRAWS, LABELS, few_labels, worth

CLASSES = 7


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    return np.random.default_rng(1).integers(0, CLASSES - 1, 900)  # the last class has no image


@pytest.fixture(scope="module")
def logits(truth: np.ndarray) -> np.ndarray:
    found = 2 * np.random.default_rng(0).normal(size=(len(truth), CLASSES))
    found[np.arange(len(truth)), truth] += 1.5
    return found


def test_accuracies_are_those_of_the_libraries(logits: np.ndarray, truth: np.ndarray) -> None:
    said = metrics.ranked(logits)
    correct = said.labels == truth
    assert correct.mean() == sklearn.accuracy_score(truth, said.labels)
    assert metrics.hits(said.ranked, truth, 5).mean() == pytest.approx(
        sklearn.top_k_accuracy_score(truth, logits, k=5, labels=range(CLASSES))
    )
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert metrics.mean_per_class(correct, truth) == pytest.approx(
            sklearn.balanced_accuracy_score(truth, said.labels)
        )
    assert metrics.macro_f1(said.labels, truth) == pytest.approx(sklearn.f1_score(truth, said.labels, average="macro"))
    assert (metrics.confusion(said.labels, truth, CLASSES) == sklearn.confusion_matrix(
        truth, said.labels, labels=range(CLASSES)
    )).all()  # fmt: skip
    ours = torch.from_numpy(logits), torch.from_numpy(truth)
    assert correct.mean() == pytest.approx(float(multiclass_accuracy(*ours, CLASSES, average="micro")))


def test_blocks_of_rows_change_nothing(logits: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = metrics.predict(logits, np.eye(CLASSES), 1.0)
    monkeypatch.setattr(metrics, "_ROWS", 64)
    blocks = metrics.predict(logits, np.eye(CLASSES), 1.0)
    for name in ("ranked", "probabilities", "margin", "entropy"):
        assert (getattr(whole, name) == getattr(blocks, name)).all()


def test_calibration_error_is_that_of_torchmetrics(logits: np.ndarray, truth: np.ndarray) -> None:
    said = metrics.ranked(logits)
    bins = metrics.reliability(said.probabilities[:, 0], said.labels == truth)
    theirs = multiclass_calibration_error(
        torch.from_numpy(logits).softmax(1), torch.from_numpy(truth), CLASSES, n_bins=metrics.BINS
    )
    assert metrics.calibration_error(bins) == pytest.approx(float(theirs), abs=1e-6)
    assert sum(each.n for each in bins) == len(truth)


def test_confidences_at_the_ends_of_a_bin_are_in_it() -> None:
    bins = metrics.reliability(np.array([0.0, 1 / 15, 0.07, 1.0]), np.array([False, True, True, True]))
    assert [(each.n, each.accuracy) for each in bins] == [(2, 0.5), (1, 1.0), (1, 1.0)]


@pytest.mark.parametrize("confidence", [0.3, 0.55, 0.9])
def test_a_temperature_brings_the_mean_confidence(logits: np.ndarray, confidence: float) -> None:
    found = metrics.temperature_for(logits, np.eye(CLASSES), 1.0, confidence)
    assert metrics.ranked(logits / found).probabilities[:, 0].mean() == pytest.approx(confidence, abs=1e-5)


def test_a_confidence_that_no_temperature_brings_gets_the_nearest(logits: np.ndarray) -> None:
    for confidence, end in ((0.0, metrics.TEMPERATURES[1]), (1.0, metrics.TEMPERATURES[0])):
        assert metrics.temperature_for(logits, np.eye(CLASSES), 1.0, confidence) == pytest.approx(end, rel=1e-6)


@pytest.mark.parametrize(("only_one", "only_other", "both"), [(9, 3, 20), (40, 11, 0), (5, 5, 5), (0, 0, 9), (1, 0, 0)])
def test_mcnemar_is_the_binomial_test(only_one: int, only_other: int, both: int) -> None:
    one = np.array([True] * (only_one + both) + [False] * only_other)
    other = np.array([False] * only_one + [True] * (both + only_other))
    n = only_one + only_other
    expected = stats.binomtest(only_one, n).pvalue if n else 1.0
    assert metrics.mcnemar(one, other) == pytest.approx(expected)
    assert metrics.mcnemar(one, other) == metrics.mcnemar(other, one)


def test_the_permutation_test_is_that_of_scipy() -> None:
    generator = np.random.default_rng(3)
    for shift in (0.0, 0.05, 0.12):
        gain = (generator.random((200, 3)) < 0.5 + shift).mean(1) - (generator.random((200, 3)) < 0.5).mean(1)
        theirs = stats.permutation_test(
            (gain,), np.mean, permutation_type="samples", n_resamples=9999, alternative="two-sided", rng=0
        ).pvalue
        assert metrics.permutation_test(gain) == pytest.approx(theirs, abs=0.02)
    assert metrics.permutation_test(np.zeros(5)) == 1.0


def test_the_bootstrap_interval_is_that_of_scipy() -> None:
    values = (np.random.default_rng(4).random((400, 3)) < 0.6).mean(1)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=9999, method="percentile", rng=0).confidence_interval
    assert metrics.bootstrap_interval(values) == pytest.approx(tuple(theirs), abs=0.003)
    assert metrics.bootstrap_interval(np.ones(1)) == (1.0, 1.0)


def test_more_labels_learn_more_and_a_method_is_worth_some() -> None:
    generator = np.random.default_rng(5)
    truth = generator.integers(0, 5, 400)
    features = generator.normal(size=(5, 16))[truth] + 2.5 * generator.normal(size=(400, 16))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    found = few_labels(features, truth)
    assert all(len(draws) == DRAWS for curve in found.values() for draws in curve)
    assert all(np.mean(curve[-1]) > np.mean(curve[0]) + 0.1 for curve in found.values())
    assert found == few_labels(features, truth)
    best = [max(np.mean(curve[place]) for curve in found.values()) for place in range(len(LABELS))]
    assert worth(found, 0.0) == LABELS[0] and worth(found, 1.0) is None and worth(found, float(best[2])) <= LABELS[2]


def test_few_labels_of_one_class() -> None:
    found = few_labels(np.ones((6, 4)) / 2, np.zeros(6, np.int64))
    assert {accuracy for curve in found.values() for draws in curve for accuracy in draws} == {1.0}
