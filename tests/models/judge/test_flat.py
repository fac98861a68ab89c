"""The map of many dimensions on a plane."""

import numpy as np

from latteflow.models.judge.flat import apart, flat


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_neighbours_stay_neighbours_and_the_map_is_the_same_every_time() -> None:
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(3, 16))
    label = np.arange(90) % 3
    images = unit(centres[label] + 0.2 * generator.normal(size=(90, 16)))
    found = flat([images, unit(centres)])
    assert found.shape == (93, 2) and np.isfinite(found).all()
    distance = np.linalg.norm(found[:90, None] - found[None, :90], axis=2) + 1e9 * np.eye(90)
    assert (label[distance.argmin(1)] == label).mean() > 0.95
    own = np.linalg.norm(found[:90, None] - found[None, 90:], axis=2).argmin(1)
    assert (own == label).mean() > 0.95, "a prototype lies among its images"
    assert (flat([images, unit(centres)]) == found).all()


def test_what_cannot_be_laid_out_has_no_place() -> None:
    assert flat([np.eye(3)]).shape == (0, 2)
    assert flat([np.ones((9, 4)) / 2, np.ones((2, 4)) / 2]).shape == (0, 2)


def test_few_images_are_not_a_speck_for_each_class() -> None:
    label = np.arange(21) % 3
    centres = np.array([[0.0, 0.0], [60.0, 10.0], [20.0, 80.0]])
    specks = centres[label] + 0.01 * np.random.default_rng(0).normal(size=(21, 2))
    specks[18:] = specks[:3]  # prototypes, each on an image
    found = apart(specks)
    distance = np.linalg.norm(found[:, None] - found[None], axis=2) + 1e9 * np.eye(21)
    assert distance.min() > 0.05 * np.ptp(found, axis=0).max()
    assert (label[distance.argmin(1)] == label).all()
