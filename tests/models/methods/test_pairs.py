"""Pairs by number: a bijection, distinct draws from any number of images, and few changes when images come and go."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import latteflow.models.methods.pc_clip.pairs
from latteflow.models.methods.pc_clip.pairs import MOST_IMAGES, draw_pairs, n_pairs, unrank
from latteflow.models.settings import PairPolicy


def exact(k: int, n: int) -> tuple[int, int]:
    """The pair by counting down whole integers, slowly."""
    for i in range(n):
        if k < n - 1 - i:
            return i, i + 1 + k
        k -= n - 1 - i
    raise AssertionError(k)


@given(st.integers(2, 60))
def test_every_pair_has_one_number(n: int) -> None:
    i, j = unrank(np.arange(n_pairs(n)), n)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == [exact(k, n) for k in range(n_pairs(n))]


@given(st.integers(2, MOST_IMAGES), st.floats(0, 1))
def test_numbers_are_exact_however_many_images(n: int, share: float) -> None:
    k = min(n_pairs(n) - 1, int(share * n_pairs(n)))
    near = sorted({min(max(k + d, 0), n_pairs(n) - 1) for d in range(-3, 4)})
    i, j = (each.tolist() for each in unrank(np.array(near), n))
    assert [a * (2 * n - a - 1) // 2 + b - a - 1 for a, b in zip(i, j, strict=True)] == near
    assert all(0 <= a < b < n for a, b in zip(i, j, strict=True))


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (10, 5), (0, 1), (0, MOST_IMAGES + 1)])
def test_a_number_out_of_range_is_an_error(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="pairs"):
        unrank(np.array([k]), n)


@given(
    st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 4)), min_size=2, max_size=40),
    st.integers(1, 200),
    st.sampled_from(["uniform", "within_group", "mixed"]),
    st.integers(0, 5),
)
def test_pairs_are_distinct_usable_and_different(
    images: list[tuple[int, int]], budget: int, policy: PairPolicy, seed: int
) -> None:
    groups, texts = zip(*images, strict=True)
    found = draw_pairs(groups, texts, budget, policy, seed)
    pairs = list(zip(found.first.tolist(), found.second.tolist(), strict=True))
    fitting = {
        (i, j)
        for j in range(len(images))
        for i in range(j)
        if texts[i] != texts[j]
        and min(groups[i], groups[j]) >= 0
        and (policy != "within_group" or groups[i] == groups[j])
    }
    unordered = [(min(pair), max(pair)) for pair in pairs]
    assert len(set(unordered)) == len(pairs) == min(budget, len(fitting))
    assert set(unordered) <= fitting
    same = [groups[i] == groups[j] for i, j in pairs]
    assert all(same[place] for place in np.flatnonzero(found.is_hard))
    again = draw_pairs(groups, texts, budget, policy, seed)
    assert again.first.tolist() == found.first.tolist() and again.second.tolist() == found.second.tolist()


def test_a_million_images() -> None:
    n = 10**6
    found = draw_pairs(np.arange(n) % 1000, np.arange(n), 20_000)
    assert len(found) == 20_000 and found.is_hard.sum() == 10_000
    assert (found.first[found.is_hard] % 1000 == found.second[found.is_hard] % 1000).all()
    assert len(set(zip(found.first.tolist(), found.second.tolist(), strict=True))) == 20_000
    assert abs((found.first < found.second).mean() - 0.5) < 0.02
    assert abs(np.concatenate([found.first, found.second]).mean() / n - 0.5) < 0.01


@pytest.mark.parametrize("listed", [0, 5_000_000])
def test_draws_are_uniform(listed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latteflow.models.methods.pc_clip.pairs, "_LISTED", listed)
    monkeypatch.setattr(latteflow.models.methods.pc_clip.pairs, "_BLOCK", 32)
    counts = np.zeros((6, 6))
    for seed in range(3000):
        found = draw_pairs([0] * 6, range(6), 3, "uniform", seed)
        np.add.at(counts, (found.first, found.second), 1)
    expected = 9000 / 30
    assert np.abs(counts[~np.eye(6, dtype=bool)] - expected).max() < 5 * np.sqrt(expected)


@pytest.mark.parametrize("listed", [0, 5_000_000])
def test_few_pairs_change_when_an_image_comes_or_goes(listed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latteflow.models.methods.pc_clip.pairs, "_LISTED", listed)

    def drawn(groups: list[int]) -> set[tuple[int, int]]:
        found = draw_pairs(groups, range(len(groups)), 5000, "mixed", 1)
        return set(zip(found.first.tolist(), found.second.tolist(), strict=True))

    groups = [i % 7 for i in range(700)]
    before = drawn(groups)
    assert len(before & drawn([*groups, 3])) > 0.99 * 5000
    assert len(before & drawn([*groups[:10], -1, *groups[11:]])) > 0.99 * 5000
    assert len(before & drawn(groups[:350])) < 0.7 * 5000
