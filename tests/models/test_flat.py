"""The map of many dimensions on a plane."""

import numpy as np

from models.flat import flat


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
