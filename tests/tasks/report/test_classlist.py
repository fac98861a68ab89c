"""What the images say of a class list, on features that were made for it."""

import numpy as np
import pytest

from latteflow.tasks.report.classlist import _alike, _Said, _shares, _strays, _twins, _words

DIM = 16


def around(direction: int, count: int, spread: float, seed: int = 0) -> np.ndarray:
    rows = np.eye(DIM)[direction] + spread * np.random.default_rng(seed).normal(size=(count, DIM))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_classes_that_share_images_are_found_and_others_are_not() -> None:
    between = around(0, 20, 0.05, 1) + around(1, 20, 0.05, 2)
    between /= np.linalg.norm(between, axis=1, keepdims=True)
    features = np.concatenate([around(0, 30, 0.05), around(2, 30, 0.05), between])
    said = _Said(features, np.eye(DIM)[:3], 10.0)
    keys = [str(row) for row in range(len(features))]
    (found,) = _alike(said, ["a", "b", "c"], keys)
    assert {found.rarer, found.other} == {"a", "b"} and 0.2 <= found.share <= 1
    assert all(int(key) >= 60 for key in found.images)


def test_counts_and_margins_are_those_of_the_plain_softmax() -> None:
    features, prototypes = around(0, 3000, 1.0), np.eye(DIM)[:5]
    said, logits = _Said(features, prototypes, 4.0), 4.0 * features @ prototypes.T
    odds = np.sort(np.exp(logits) / np.exp(logits).sum(1, keepdims=True), axis=1)
    assert np.array_equal(said.best, logits.argmax(1))
    assert said.counts.tolist() == np.bincount(logits.argmax(1), minlength=5).tolist()
    assert np.allclose(said.margin, odds[:, -1] - odds[:, -2])
    assert np.allclose(said.score, np.log(np.exp(logits).sum(1)))


def test_images_of_a_class_that_is_missing_come_together_with_their_words() -> None:
    features = np.concatenate([around(0, 150, 0.1), around(1, 150, 0.1), around(5, 20, 0.02)])
    keys = [str(row) for row in range(len(features))]
    texts = {key: "a photo of a heron" if int(key) >= 300 else "a photo of a robin" for key in keys}
    said = _Said(features, np.eye(DIM)[:2], 10.0)
    found = _strays(said, features, ["robin", "wren"], keys, texts)[0]
    assert found.count >= 15 and found.words[0] == "heron"
    assert all(int(key) >= 300 for key in found.images)


def test_too_few_images_have_no_strays() -> None:
    features = around(0, 20, 0.5)
    assert not _strays(_Said(features, np.eye(DIM)[:2], 10.0), features, ["a", "b"], [*map(str, range(20))], {})


@pytest.mark.parametrize("told", [[], ["a robin"]])
def test_no_word_is_made_up(told: list[str]) -> None:
    assert _words(told, _shares(["a robin", "a wren"]), ["robin"]) == []


def test_the_same_picture_in_several_places_is_one_group() -> None:
    features = around(0, 2000, 1.0)
    features[[7, 1500, 1999]] = features[3]
    assert _twins(features, [str(row) for row in range(2000)]) == [["3", "7", "1500", "1999"]]
