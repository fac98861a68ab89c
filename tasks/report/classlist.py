"""review: what the images say of the class list. Names that nothing is near, names that nothing tells apart, images
that fit none of them, pictures that are there more than once. No label is read, and nothing is decided here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from latteflow.storage.shards import read_index
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.features import centred, read_features
from latteflow.tasks.core.stage import StageResult, open_store
from latteflow.tasks.describe.screen import read_screened, usable
from latteflow.tasks.tune.select import label_free_temperature, trusted

SHOWN = 6
"""Pictures of a finding."""
MOST = 24
"""Findings of a kind."""
TORN = 0.2
"""Of the images of the rarer of two classes, the share that is torn between them, from which on the two are shown."""
MARGIN = 0.2
"""An image is torn between its best two classes where their probabilities differ by no more than this."""
STRAYS = 0.1
"""Share of the images, those that fit their class worst, among which a class that is missing is looked for."""
MOST_STRAYS = 3_000
LEAST_CLUSTER = 5
LEAST_SHARE = 0.1
"""Of the texts of some look-alikes that must have a word for it to be shown."""
TWIN = 0.97
"""Cosine of the centred features of two pictures that are taken to be one."""
_BLOCK = 1024


@dataclass(frozen=True)
class Count:
    """A class, how many images are said to be of it, and, if these are few, those nearest to it."""

    name: str
    images: int
    nearest: Sequence[str] = ()


@dataclass(frozen=True)
class Alike:
    """Two classes that share images: so many of the rarer one's are torn between the two, as a share."""

    rarer: str
    other: str
    share: float
    images: Sequence[str]


@dataclass(frozen=True)
class Strays:
    """Look-alikes that fit the classes they are given to badly.

    Attributes:
        count: of the images.
        images: keys of those in the middle.
        words: that their texts have more often than other texts do; the first is a name to begin with.
        texts: some of theirs.
        given: the classes they are given to, the most frequent first.
    """

    count: int
    images: Sequence[str]
    words: Sequence[str]
    texts: Sequence[str]
    given: Sequence[str]


@dataclass(frozen=True)
class Review:
    """What the images of a domain say of its class list.

    Attributes:
        model: who answered.
        images: how many there are.
        classes: all, in the order of the domain file.
        unused: those with the fewest images, none or hardly one.
        alike, strays, twins: see the classes; twins are keys of images that look the same.
        paths: of every image that is named above, by key.
    """

    domain: str
    model: str
    images: int
    classes: Sequence[Count]
    unused: Sequence[Count]
    alike: Sequence[Alike]
    strays: Sequence[Strays]
    twins: Sequence[Sequence[str]]
    paths: Mapping[str, str]


def review(
    domain: Domain,
    images: StageResult,
    embedded: StageResult,
    screened: StageResult,
    tuned: StageResult,
    selected: StageResult,
) -> Review:
    """Look at a domain's class list through the model that `select` kept.

    Logits are divided by the temperature that an export of the model would have.
    """
    store = open_store(domain)
    shards, found = store.open(images.ref), read_features(store.open(embedded.ref))
    model = trusted(domain, store.open(selected.ref), store.open(tuned.ref), shards, found)
    space = centred(found.embeds, found.centre)
    head = model.features, model.prototypes, model.scale
    said = _Said(*head[:2], model.scale / label_free_temperature(found, *head, model.method))
    captions = usable(read_screened(store.open(screened.ref), "images"))
    texts = dict(zip(captions["member_keys"].list.first(), captions["text"], strict=True))
    names, keys = domain.classes, found.keys
    few = max(1, len(keys) // len(names) // 20)
    rare = [number for number in np.argsort(said.counts, kind="stable").tolist() if said.counts[number] < few]
    result = Review(
        domain=domain.name,
        model=model.name,
        images=len(keys),
        classes=[Count(name, int(count)) for name, count in zip(names, said.counts, strict=True)],
        unused=[
            Count(names[number], int(said.counts[number]), [keys[row] for row in said.nearest(number)])
            for number in rare[:MOST]
        ],
        alike=list(_alike(said, names, keys)),
        strays=_strays(said, space, names, keys, texts),
        twins=_twins(space, keys),
        paths={},
    )
    index = read_index(shards)
    every = dict(index.select("key", "path").iter_rows())
    return Review(**{**vars(result), "paths": {key: every[key] for key in _named(result)}})


class _Said:
    """What a model says of all images, a block of rows at a time.

    Attributes:
        best, second: rows of the classes, ``(n,)``; margin: of their probabilities, ``(n,)``; score: energy, ``(n,)``.
        counts: images of each class, ``(classes,)``.
    """

    def __init__(self, features: np.ndarray, prototypes: np.ndarray, scale: float) -> None:
        self._features, self._prototypes = features, prototypes
        best, second, margin, score = [], [], [], []
        for start in range(0, len(features), _BLOCK):
            logits = scale * features[start : start + _BLOCK] @ prototypes.T
            top = logits.max(1, keepdims=True)
            mass = np.exp(logits - top)
            order = np.argpartition(-logits, 1, axis=1)[:, :2]
            two = np.take_along_axis(logits, order, 1)
            order = np.take_along_axis(order, np.argsort(-two, axis=1, kind="stable"), 1)
            odds = np.take_along_axis(mass, order, 1) / mass.sum(1, keepdims=True)
            best.append(order[:, 0])
            second.append(order[:, 1])
            margin.append(odds[:, 0] - odds[:, 1])
            score.append(np.log(mass.sum(1)) + top[:, 0])
        self.best, self.second, self.margin, self.score = map(np.concatenate, (best, second, margin, score))
        self.counts = np.bincount(self.best, minlength=len(prototypes))

    def nearest(self, number: int) -> list[int]:
        """Rows of the images nearest to a class, whatever class they are given."""
        cosines = self._features @ self._prototypes[number]
        return np.argsort(-cosines, kind="stable")[:SHOWN].tolist()


def _alike(said: _Said, names: Sequence[str], keys: Sequence[str]) -> Iterator[Alike]:
    """Pairs of classes by the share of the rarer one's images that are torn between the two."""
    torn = np.flatnonzero(said.margin <= MARGIN)
    pairs = Counter(
        tuple(sorted(pair)) for pair in zip(said.best[torn].tolist(), said.second[torn].tolist(), strict=True)
    )
    shares = {
        (one, other): count / max(1, min(said.counts[one], said.counts[other])) for (one, other), count in pairs.items()
    }
    worst = sorted((pair for pair in pairs if pairs[pair] > 1 and shares[pair] >= TORN), key=lambda pair: -pairs[pair])
    for one, other in worst[:MOST]:
        if said.counts[one] > said.counts[other]:
            one, other = other, one
        rows = torn[np.isin(said.best[torn], (one, other)) & np.isin(said.second[torn], (one, other))]
        rows = rows[np.argsort(said.margin[rows], kind="stable")][:SHOWN]
        share = min(1.0, float(shares[min(one, other), max(one, other)]))
        yield Alike(names[one], names[other], share, [keys[row] for row in rows])


def _strays(
    said: _Said, space: np.ndarray, names: Sequence[str], keys: Sequence[str], texts: Mapping[str, str]
) -> list[Strays]:
    """Clusters among the images that fit worst, the largest first."""
    from sklearn.cluster import HDBSCAN

    count = min(MOST_STRAYS, int(STRAYS * len(keys)))
    if count < 2 * LEAST_CLUSTER:
        return []
    rows = np.argsort(said.score, kind="stable")[:count]
    everywhere = _shares(list(texts.values()))
    clusters = HDBSCAN(min_cluster_size=LEAST_CLUSTER, copy=True).fit_predict(space[rows])
    found = []
    for number in range(clusters.max() + 1):
        own = rows[clusters == number]
        middle = space[own].mean(0)
        own = own[np.argsort(-(space[own] @ middle), kind="stable")]
        told = [texts[keys[row]] for row in own if keys[row] in texts]
        given = Counter(said.best[own].tolist()).most_common(3)
        found.append(
            Strays(
                count=len(own),
                images=[keys[row] for row in own[:SHOWN]],
                words=_words(told, everywhere, names),
                texts=told[:3],
                given=[names[label] for label, _ in given],
            )
        )
    return sorted(found, key=lambda each: -each.count)[:MOST]


def _shares(texts: Sequence[str]) -> dict[str, float]:
    """Of each word that more than one text has, the share of the texts that have it."""
    counts = Counter(word for text in texts for word in set(re.findall(r"[^\W\d_]{3,}", text.lower())))
    return {word: count / len(texts) for word, count in counts.items() if count > 1}


def _words(told: Sequence[str], everywhere: Mapping[str, float], names: Sequence[str]) -> list[str]:
    """Words that some texts have twice as often as all have them, best first; no words of class names.

    Args:
        everywhere: :func:`_shares` of all texts.
    """
    known = {word for name in names for word in re.findall(r"[^\W\d_]+", name.lower())}
    shares = {word: share for word, share in _shares(told).items() if word not in known}
    found = [word for word, share in shares.items() if share > max(LEAST_SHARE, 2 * everywhere[word])]
    return sorted(found, key=lambda word: (everywhere[word] - shares[word], word))[:5]


def _twins(space: np.ndarray, keys: Sequence[str]) -> list[list[str]]:
    """Images that look the same, in groups, the largest first."""
    import torch
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    features = torch.from_numpy(np.ascontiguousarray(space, np.float32))
    pairs = []
    for start in range(0, len(features), _BLOCK):
        alike = (features[start : start + _BLOCK] @ features[start:].T > TWIN).nonzero() + start
        pairs.append(alike[alike[:, 0] < alike[:, 1]])
    one, other = torch.cat(pairs).numpy().T
    size, ones = len(keys), np.ones(len(one), bool)
    _, parts = connected_components(coo_array((ones, (one, other)), shape=(size, size)), directed=False)
    groups: dict[int, list[str]] = {}
    for row in np.unique([one, other]):
        groups.setdefault(int(parts[row]), []).append(keys[row])
    return sorted(groups.values(), key=lambda each: (-len(each), each))[:MOST]


def _named(found: Review) -> set[str]:
    """Keys of all images that a review shows."""
    shown = [
        *(each.nearest for each in found.unused),
        *(each.images for each in found.alike),
        *(each.images for each in found.strays),
        *(each[:SHOWN] for each in found.twins),
    ]
    return {key for keys in shown for key in keys}
