"""Which images are drawn to be labelled."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latteflow.tasks.report.sample import evenly


@given(size=st.integers(1, 500), n=st.integers(1, 600), seed=st.integers(0, 100))
def test_each_is_drawn_once_and_every_stretch_has_its_share(size: int, n: int, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(size)
    found = evenly(order, n, np.random.default_rng(seed))
    assert len(found) == len(set(found.tolist())) == min(n, size)
    half = np.isin(found, order[: size // 2]).sum()
    assert abs(half - len(found) * (size // 2) / size) <= 1


def test_each_has_the_same_chance() -> None:
    draws = np.random.default_rng(0)
    counts = sum(np.bincount(evenly(np.arange(37), 10, draws), minlength=37) for _ in range(20_000))
    assert counts / 20_000 == pytest.approx(np.full(37, 10 / 37), abs=0.02)
