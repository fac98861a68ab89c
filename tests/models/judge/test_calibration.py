"""A temperature without labels, on generated problems whose labels only the measurement sees."""

import numpy as np
import pytest
import torch

from latteflow.models.judge import metrics
from latteflow.models.judge.calibration import expected_accuracy, neighbours_say, temperature
from latteflow.models.methods.transduction import TransductionSettings
from latteflow.models.methods.transduction.tuning import transduce


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def error(cosines: np.ndarray, scale: float, truth: np.ndarray) -> float:
    found = metrics.ranked(scale * cosines.astype(np.float64))
    return metrics.calibration_error(metrics.reliability(found.probabilities[:, 0], found.labels == truth))


@pytest.mark.parametrize("classes", [3, 30])
@pytest.mark.parametrize("images", [10, 60])
@pytest.mark.parametrize(("overlap", "wrong"), [(1.0, 0.5), (2.0, 1.0), (2.5, 6.0)])
def test_it_is_as_sure_as_it_is_right_or_nearer_to_it(classes: int, images: int, overlap: float, wrong: float) -> None:
    """Images that overlap and names that are off, to the point of chance; few and many images and classes."""
    generator = np.random.default_rng(0)
    means, texts = (generator.normal(size=(classes, 64)) for _ in range(2))
    texts = unit(means + wrong * texts)

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        truth = generator.integers(0, classes, n)
        return unit(means[truth] + overlap * generator.normal(size=(n, 64))), truth

    (features, _), (unseen, truth) = draw(classes * images), draw(2000)
    found = transduce(TransductionSettings(), torch.from_numpy(features), torch.from_numpy(texts), 100.0)
    prototypes = found.prototypes.numpy()
    said = neighbours_say(features, (features @ texts.T).argmax(1), classes)
    expected = expected_accuracy((features @ prototypes.T).argmax(1), said)
    heat = temperature(features, prototypes, 100.0, expected)
    cosines = unseen @ prototypes.T
    assert heat >= 1
    before, after = error(cosines, 100.0, truth), error(cosines, 100.0 / heat, truth)
    assert after <= before + 0.2 and after < 0.35  # it errs to the side of doubt, and not far
    if before > 0.4:  # a model that is sure and wrong is told so
        assert after < 0.75 * before


def test_edges() -> None:
    one = np.eye(1, 4, dtype=np.float32)
    assert neighbours_say(one, np.array([2]), 3).tolist() == [2]
    assert expected_accuracy(np.array([1]), np.array([1])) == pytest.approx(2 / 3)
    same = np.repeat(one, 5, 0)  # images that are all alike say nothing, and nothing breaks
    assert neighbours_say(same, np.array([0, 1, 1, 1, 1]), 3).tolist() == [1] * 5
    assert temperature(same, np.eye(3, 4, dtype=np.float32), 100.0, 0.01) > 1
    assert temperature(same, np.eye(3, 4, dtype=np.float32), 1e-3, 0.9) == 1
