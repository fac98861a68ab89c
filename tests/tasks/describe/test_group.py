"""Groups of look-alikes: who is in them, and that images that come later leave them as they are."""

from __future__ import annotations

import hashlib
import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from latteflow.tasks.describe.group import look_alikes, members_of


def images(n: int, classes: int, night: int) -> dict[str, int]:
    """Keys of a night's shards with their labels, in the order of the shards."""
    draws = random.Random(night)
    shards = [sorted(hashlib.sha256(f"{night} {i}".encode()).hexdigest() for i in range(at, min(at + 50, n)))
              for at in range(0, n, 50)]  # fmt: skip
    return {key: draws.randrange(classes) for shard in shards for key in shard}


@given(
    first=st.integers(1, 300), nights=st.lists(st.integers(0, 40), max_size=4), classes=st.integers(1, 12),
    size=st.integers(1, 6),
)  # fmt: skip
def test_membership_stays_when_images_come(first: int, nights: list[int], classes: int, size: int) -> None:
    labels = images(first, classes, 0)
    for night, new in enumerate(nights, 1):
        before = {group.anchor: group for group in look_alikes(labels, size)}
        count = {label: sum(each == label for each in labels.values()) for label in range(classes)}
        labels = labels | images(new, classes, night)
        after = {group.anchor: group for group in look_alikes(labels, size)}
        assert list(after) == sorted(labels, key=labels.__getitem__)
        for anchor, group in before.items():
            # A class that is smaller than two groups has yet to fill them.
            assert after[anchor] == group or count[group.label] < 2 * size - 1


@given(n=st.integers(1, 120), classes=st.integers(1, 5), size=st.integers(1, 6))
def test_each_image_has_a_group_of_its_own_of_its_class(n: int, classes: int, size: int) -> None:
    labels = images(n, classes, 0)
    groups = look_alikes(labels, size)
    assert sorted(group.anchor for group in groups) == sorted(labels)
    for group in groups:
        assert group.anchor in group.members and {labels[key] for key in group.members} == {group.label}
        assert len(group.members) == min(size, sum(label == group.label for label in labels.values()))
        assert list(group.members) == sorted(set(group.members))
    of_large = [group.members for group in groups if sum(each.label == group.label for each in groups) > size]
    assert len(set(of_large)) == len(of_large)


@given(
    n=st.integers(1, 600), classes=st.integers(1, 30), size=st.integers(1, 6), first=st.integers(0, 600),
    count=st.integers(0, 60),
)  # fmt: skip
def test_groups_of_some_images_are_those_among_the_groups_of_all(
    n: int, classes: int, size: int, first: int, count: int
) -> None:
    labels = images(n, classes, 0)
    keys = list(labels)
    anchors = np.arange(n)[first : first + count]
    found = members_of(np.array(list(labels.values()), np.int32), anchors, size)
    every = {group.anchor: group.members for group in look_alikes(labels, size)}
    told = {keys[anchor]: tuple(sorted(keys[row] for row in rows)) for anchor, rows in zip(anchors, found, strict=True)}
    assert told == {keys[anchor]: every[keys[anchor]] for anchor in anchors}


def test_a_night_asks_for_its_own_groups_alone() -> None:
    old = images(20_000, 100, 0)
    known = {group.members for group in look_alikes(old, 4)}
    groups = look_alikes(old | images(200, 100, 1), 4)
    assert len({group.members for group in groups} - known) == 200


def test_a_domain_in_one_shard_keeps_nearly_all_texts_of_before() -> None:
    """When groups were rings by key."""
    labels = {key: number % 2 for number, key in enumerate(sorted(images(50, 1, 0)))}
    rings = [[key for key in labels if labels[key] == label] for label in (0, 1)]
    before = {tuple(sorted((ring * 2)[at : at + 4])) for ring in rings for at in range(len(ring))}
    assert len({group.members for group in look_alikes(labels, 4)} - before) == 2 * 3
