"""Pairs of images to be compared: drawn from all of them by number, so that a million images need no list of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latteflow.models.settings import PairPolicy

Ints = NDArray[np.int64]

_BLOCK = 1 << 16
_LISTED = 5_000_000
"""Up to so many pairs are listed and the first in a random order taken; of more, some are drawn until enough fit."""
MOST_IMAGES = 1 << 30
"""So that a pair's number, times 8, is an int64."""


def n_pairs(n: int) -> int:
    """Pairs of n images."""
    return n * (n - 1) // 2


def unrank(numbers: Ints, n: int) -> tuple[Ints, Ints]:
    """The pairs with these numbers, in the order (0, 1), (0, 2), ... (n - 2, n - 1); exact (PC-CLIP 3.1).

    Args:
        numbers: ``0 <= k < n (n - 1) / 2``, any shape.
        n: images, 2 to 2**30.

    Returns:
        ``i < j``, of the same shape.

    Raises:
        ValueError: a number is out of range, or there are too many images.
    """
    k = np.asarray(numbers, np.int64)
    total = n_pairs(n)
    if not 2 <= n <= MOST_IMAGES:
        raise ValueError(f"pairs need 2 to {MOST_IMAGES} images, got {n}")
    if k.size and not 0 <= k.min() <= k.max() < total:
        raise ValueError(f"the pairs of {n} images have the numbers 0 to {total - 1}, got {k.min()} to {k.max()}")
    from_end = total - 1 - k
    m = ((np.sqrt(8.0 * from_end + 1) - 1) / 2).astype(np.int64)
    # The root is rounded; it is off by one at most.
    m -= m * (m + 1) // 2 > from_end
    m += (m + 1) * (m + 2) // 2 <= from_end
    i = n - 2 - m
    return i, k - i * (2 * n - i - 1) // 2 + i + 1


@dataclass(frozen=True)
class Pairs:
    """Ordered pairs of images by number: `first` and `second`, ``(p,)`` each; `is_hard`: drawn from within a group."""

    first: Ints
    second: Ints
    is_hard: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.first)


def draw_pairs(
    groups: Sequence[int] | Ints, texts: Sequence[int] | Ints, budget: int, policy: PairPolicy = "mixed", seed: int = 0
) -> Pairs:
    """Distinct pairs of images, in random order, either image first with probability 1/2.

    Their order does not depend on how many images there are, up to the next power of two; the first that fit are taken.
    So when images are added at the end, or some drop out, nearly all pairs stay, and with them the texts about them.

    Args:
        groups: number of each image's group, ``(n,)``; below 0 where an image is not to be used.
        texts: number of each image's text, ``(n,)``, 0 or more; images with the same text are not compared.
        budget: pairs at most.
        policy: uniform: any two images. within_group: two of one group. mixed: half of these, half of those; with too
            few pairs within groups more of the others.
        seed: of the draws.

    Returns:
        As many pairs as there are, at most `budget`; none where all texts are the same.
    """
    group, text = np.asarray(groups, np.int64), np.asarray(texts, np.int64)
    everyone = np.where(group < 0, -1, 0)
    none = np.zeros(0, np.int64)
    hard = easy = none
    if policy != "uniform":
        hard = _draw(group, text, budget if policy == "within_group" else budget // 2, 2 * seed, none)
    if policy != "within_group":
        easy = _draw(everyone, text, budget - len(hard), 2 * seed + 1, hard)
    drawn = np.concatenate([hard, easy])
    if not len(drawn):
        return Pairs(none, none, np.zeros(0, np.bool_))
    i, j = unrank(drawn >> 1, _capacity(len(group)))
    flip = drawn & 1 == 1
    return Pairs(np.where(flip, j, i), np.where(flip, i, j), np.arange(len(drawn)) < len(hard))


def _capacity(n: int) -> int:
    return max(2, 1 << (n - 1).bit_length())


def _draw(group: Ints, text: Ints, count: int, seed: int, besides: Ints) -> Ints:
    """Numbers of distinct fitting pairs, doubled, plus 1 where the second image comes first.

    Args:
        besides: drawn before; their pairs are not drawn again.
    """
    n = len(group)
    left = _fitting(group, text) - len(besides)
    count = min(count, left)
    if count <= 0:
        return np.zeros(0, np.int64)
    capacity = _capacity(n)
    if left <= max(_LISTED, 2 * count):
        every = _all_fitting(group, text, capacity)
        order = _shuffled(every[~np.isin(every, besides >> 1)], seed)[:count]
        return 2 * order + (_hashed(order, seed + 1) & np.uint64(1)).astype(np.int64)
    found, generator = np.zeros(0, np.int64), np.random.default_rng(seed)
    while len(found) < count:
        drawn = generator.integers(2 * n_pairs(capacity), size=_BLOCK)
        i, j = unrank(drawn >> 1, capacity)
        drawn, i, j = (each[j < n] for each in (drawn, i, j))
        fits = (group[i] == group[j]) & (group[i] >= 0) & (text[i] != text[j])
        drawn = np.concatenate([found, drawn[fits]])
        _, place = np.unique(drawn >> 1, return_index=True)
        found = drawn[np.sort(place)]
        found = found[~np.isin(found >> 1, besides >> 1)]
    return found[:count]


def _fitting(group: Ints, text: Ints) -> int:
    """How many pairs are of one group and not of one text."""
    used = group >= 0
    sizes = np.unique(group[used], return_counts=True)[1]
    twins = np.unique(group[used] * (text.max() + 1) + text[used], return_counts=True)[1]
    return sum(map(n_pairs, sizes.tolist())) - sum(map(n_pairs, twins.tolist()))


def _all_fitting(group: Ints, text: Ints, capacity: int) -> Ints:
    """Numbers of all pairs that are of one group and not of one text."""
    found = []
    for number in np.unique(group[group >= 0]):
        members = np.flatnonzero(group == number)
        for place, i in enumerate(members[:-1]):
            j = members[place + 1 :]
            j = j[text[j] != text[i]]
            found.append(i * (2 * capacity - i - 1) // 2 + j - i - 1)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _shuffled(numbers: Ints, seed: int) -> Ints:
    """In an order that the numbers alone decide: one more changes no other's turn."""
    return numbers[np.argsort(_hashed(numbers, seed), kind="stable")]


def _hashed(numbers: Ints, seed: int) -> NDArray[np.uint64]:
    """SplitMix64 of each number, after the seed's own."""
    x = numbers.astype(np.uint64) + np.uint64((seed * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))
