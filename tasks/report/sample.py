"""sample: images whose labels say the most for how few they are. What is picked depends on no label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latteflow.storage.shards import read_index
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.features import read_features
from latteflow.tasks.core.stage import StageResult, open_store
from latteflow.tasks.tune.select import trusted


@dataclass(frozen=True)
class Sample:
    """Images to be labelled, in a random order.

    Attributes:
        keys, paths: of the images, ``(n,)``.
        of: how many images it was drawn from.
    """

    keys: Sequence[str]
    paths: Sequence[str]
    of: int


def sample(
    domain: Domain, images: StageResult, embedded: StageResult, tuned: StageResult, selected: StageResult, n: int
) -> Sample:
    """Draw training images evenly by class, by whether the kept model and zero-shot dispute them, and by confidence.

    All images stand in that order, and every so-manyth is taken from a random start (systematic sampling; Cochran,
    *Sampling Techniques*, 1977, chapter 8). Each has the same chance, so that means over the sample are those of all
    images without weights; and intervals which take it for a simple random sample are rather too wide than too narrow,
    as each class and the disputed images have their due share. The draw is the same for the same run and n.
    """
    store = open_store(domain)
    shards, found = store.open(images.ref), read_features(store.open(embedded.ref))
    model = trusted(domain, store.open(selected.ref), store.open(tuned.ref), shards, found)
    logits = model.features @ model.prototypes.T
    answers, sure = logits.argmax(1), logits.max(1)
    order = np.lexsort((sure, answers != found.zero_shot, answers))
    draws = np.random.default_rng(int(embedded.ref.digest[:16], 16))
    rows = evenly(order, n, draws)
    paths = dict(read_index(shards).select("key", "path").iter_rows())
    keys = [found.keys[row] for row in draws.permutation(rows)]
    return Sample(keys, [paths[key] for key in keys], len(order))


def evenly(order: np.ndarray, n: int, draws: np.random.Generator) -> np.ndarray:
    """Every so-manyth of some things from a random start, ``(min(n, len(order)),)``: each has the same chance."""
    count = min(n, len(order))
    return order[((draws.random() + np.arange(count)) * len(order) / count).astype(int)]
