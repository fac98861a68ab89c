"""A describer without a language model: names the ImageNet classes and WordNet kinds that an image feature is close to.

It is a fallback and no caption. It sees only what the CLIP model itself can tell apart among 1000 classes, so its
sentences add WordNet's knowledge (which names belong together) and nothing else about the picture. It works from unit
features that are computed anyway, so no image is decoded for it.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

from latteflow.models.data.wordnet import Synset, synsets
from latteflow.models.texts.describers import Item, Kind, Text

Floats = NDArray[np.floating]

NAMES_PER_IMAGE = 3
NAME_THRESHOLD = 0.08
KIND_THRESHOLD = 0.45
DOMAIN_SHARE = 0.7  # of the domain's mean that is taken out, so that what all its images share does not hide the rest
ROWS_PER_CHUNK = 4096

N_CLASSES = 1000


def _words(listed: str) -> frozenset[str]:
    return frozenset(" ".join(listed.split()).split(", "))


VAGUE = _words(
    """
    abstraction, agent, article, causal agent, commodity, communication, consumer goods, control, durables,
    electrical device, fluid, game, ingredient, matter, natural object, nutriment, obstruction, part, piece,
    placental, racer, relation, solid, staff, substance, support, system, ware, weight
    """
)
UNCOUNTED = _words(
    """
    alcohol, armor, attire, baked goods, binoculars, body armor, bread, broccoli, carbonara, cauliflower, chain
    mail, chocolate sauce, citrus, clothing, consomme, corn, crockery, dough, eggnog, electronic equipment,
    equipment, espresso, face powder, food, foodstuff, footwear, furniture, game equipment, golf equipment,
    guacamole, hair spray, hay, hosiery, ice cream, makeup, mashed potato, neckwear, outerwear, parallel bars,
    photographic equipment, produce, public transport, rapeseed, red wine, Sennenhunde, snack food, sports
    equipment, starches, sunglasses, sunscreen, swimming trunks, swine, tableware, thatch, toilet tissue, velvet,
    white goods, woman's clothing, wool
    """
)
SOUNDS_LIKE_CONSONANT = re.compile(r"eu|ewe|one\b|uni[^mn]|us[eu]|ut[ei]", re.IGNORECASE)
SOUNDS_LIKE_VOWEL = re.compile(r"[aeiou]|heir|honest|honou?r|hour", re.IGNORECASE)


@dataclass(frozen=True)
class TagVocabulary:
    """Names that can be seen in a feature, and kinds that gather several names."""

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    """The most specific first: a kind never comes after one that gathers more names."""
    members: tuple[tuple[int, ...], ...]
    """For each kind the indices of its names."""

    @classmethod
    def imagenet(cls) -> Self:
        """The 1000 ImageNet classes and the WordNet nouns above 2 to 300 of them that say something."""
        leaves, hypernyms = synsets()[:N_CLASSES], synsets()[N_CLASSES:]
        uses = Counter(leaf.lemmas[0].lower() for leaf in leaves)

        def name(leaf: Synset) -> str:  # the corgi is a Cardigan Welsh corgi, beside the cardigan that is worn
            return leaf.lemmas[1 if uses[leaf.lemmas[0].lower()] > 1 and len(leaf.lemmas) > 1 else 0]

        kinds: dict[tuple[int, ...], str] = {}  # of the kinds with the same members the shortest name: fish, turtle
        for node in hypernyms:
            kind = node.lemmas[0]
            if kind not in VAGUE and len(kind) < len(kinds.get(node.leaves, 99 * "-")):
                kinds[node.leaves] = kind
        ordered = sorted(kinds.items(), key=lambda item: (len(item[0]), item[0]))
        return cls(
            names=tuple(name(leaf) for leaf in leaves),
            kinds=tuple(kind for _, kind in ordered),
            members=tuple(leaves for leaves, _ in ordered),
        )

    @property
    def prompts(self) -> list[str]:
        """One text for each name; the CLIP model's text tower turns them into the vocabulary features."""
        return [f"a photo of {with_article(name)}." for name in self.names]

    @cached_property
    def membership(self) -> NDArray[np.float32]:
        """1 where a name is of a kind, ``(n_names, n_kinds)``."""
        matrix = np.zeros((len(self.names), len(self.kinds)), dtype=np.float32)
        for column, rows in enumerate(self.members):
            matrix[list(rows), column] = 1
        return matrix


def describe_features(
    features: Floats,
    vocabulary: TagVocabulary,
    vocabulary_features: Floats,
    logit_scale: float,
    domain_mean: Floats | None = None,
) -> list[str]:
    """One sentence an image, such as "a picture of a fruit, like a pomegranate or an orange.".

    The names are the up to three most probable with more than 0.08; the kind is the most specific one whose names sum
    to more than 0.45. With a kind, only names of that kind are said; without a likely name, the likeliest stands alone.
    A sentence depends on its own row and ``domain_mean`` only.

    Args:
        features: unit rows, ``(n, dim)``.
        vocabulary_features: unit features of ``vocabulary.prompts``, ``(n_names, dim)``.
        logit_scale: the model's own, ``exp`` applied: 100 for most CLIP models.
        domain_mean: mean of the domain's unit features, ``(dim,)``; without it nothing is subtracted.
    """
    texts = _texts(features, vocabulary, vocabulary_features, logit_scale, domain_mean)
    return [f"a picture of {text}." for text in texts]


def describe_groups(
    groups: Sequence[Floats],
    vocabulary: TagVocabulary,
    vocabulary_features: Floats,
    logit_scale: float,
    domain_mean: Floats | None = None,
) -> list[str]:
    """One sentence a group for what its images share, read from their mean direction.

    Args: as for `describe_features`; ``groups`` hold the members' unit rows, ``(m, dim)`` each.

    Raises:
        ValueError: a group is empty.
    """
    if not all(len(features) for features in groups):
        raise ValueError("a group of 0 images cannot be described; give at least one feature row")
    means = np.stack([features.mean(0) for features in groups])
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    texts = _texts(means, vocabulary, vocabulary_features, logit_scale, domain_mean)
    return [f"pictures that have in common {text}." for text in texts]


def with_article(name: str) -> str:
    """The name with "a" or "an" by its sound, or bare when it is not counted: "an hourglass", "a unicycle", "corn"."""
    if name in UNCOUNTED:
        return name
    is_vowel = SOUNDS_LIKE_VOWEL.match(name) and not SOUNDS_LIKE_CONSONANT.match(name)
    return f"{'an' if is_vowel else 'a'} {name}"


def _texts(
    features: Floats,
    vocabulary: TagVocabulary,
    vocabulary_features: Floats,
    logit_scale: float,
    domain_mean: Floats | None,
) -> Iterator[str]:
    weights = (logit_scale * vocabulary_features.T).astype(np.float32)
    offset = 0 if domain_mean is None else DOMAIN_SHARE * (domain_mean.astype(np.float32) @ weights)
    for start in range(0, len(features), ROWS_PER_CHUNK):
        logits = features[start : start + ROWS_PER_CHUNK].astype(np.float32) @ weights - offset
        probs = np.exp(logits - logits.max(1, keepdims=True))
        probs /= probs.sum(1, keepdims=True)

        is_kind = probs @ vocabulary.membership > KIND_THRESHOLD
        kinds = np.where(is_kind.any(1), is_kind.argmax(1), -1)
        probs *= np.where(kinds[:, None] >= 0, vocabulary.membership.T[kinds], 1)
        rows, names = np.nonzero(probs > NAME_THRESHOLD)
        by_probability = np.lexsort((names, -probs[rows, names], rows))
        said = np.split(names[by_probability], np.searchsorted(rows, np.arange(1, len(probs))))
        for kind, likely, best in zip(kinds.tolist(), said, probs.argmax(1).tolist(), strict=True):
            yield _text(vocabulary, kind, likely[:NAMES_PER_IMAGE].tolist() or [best])


def _text(vocabulary: TagVocabulary, kind: int, names: list[int]) -> str:
    """ "a fruit, like a fig or an orange" of a kind (index, or -1 for none) and the names to say."""
    said = list(dict.fromkeys(with_article(vocabulary.names[name]) for name in names))
    listed = " or ".join(filter(None, (", ".join(said[:-1]), said[-1])))
    return f"{with_article(vocabulary.kinds[kind])}, like {listed}" if kind >= 0 else f"something like {listed}"


class Tags:
    """The describer, for one CLIP and one domain.

    Args:
        vocabulary: the words.
        vocabulary_features: their unit text features by the CLIP's own text tower, ``(n_names, dim)``.
        logit_scale: the model's own, ``exp`` applied.
        domain_mean: mean of the domain's unit image features, ``(dim,)``.
    """

    def __init__(
        self, vocabulary: TagVocabulary, vocabulary_features: Floats, logit_scale: float, domain_mean: Floats
    ) -> None:
        self._known = (vocabulary, vocabulary_features, logit_scale, domain_mean)

    engine = "tags"

    def describe(self, kind: Kind, items: Sequence[Item]) -> Iterator[dict[int, Text]]:
        """One sentence for each item."""
        features = [item.features() for item in items]
        if kind == "group":
            texts = describe_groups(features, *self._known)
        else:
            texts = describe_features(np.concatenate(features), *self._known)
        yield {place: Text(text) for place, text in enumerate(texts)}
