import gzip
import json

import numpy as np
import pytest

from latteflow.models.data import wordnet
from latteflow.models.texts.describers.tags import TagVocabulary, describe_features, describe_groups, with_article

FRUIT = TagVocabulary(
    names=("pomegranate", "orange", "hammer", "hourglass"),
    kinds=("fruit", "thing"),
    members=((0, 1), (0, 1, 2, 3)),
)
AXES = np.eye(4, dtype=np.float32)


def describe(features: np.ndarray, scale: float, mean: np.ndarray | None = None) -> list[str]:
    return describe_features(np.asarray(features, np.float32), FRUIT, AXES, scale, mean)


def test_the_table_holds_what_the_specification_says() -> None:
    synsets = wordnet.synsets()
    assert len(synsets) == 1461
    assert [s.leaves for s in synsets[:1000]] == [(i,) for i in range(1000)]
    assert all(2 <= len(s.leaves) <= 300 for s in synsets[1000:])
    assert (synsets[0].wnid, synsets[0].lemmas) == ("n01440764", ("tench", "Tinca tinca"))
    assert synsets[957].gloss.startswith("large globular fruit having many seeds with juicy red pulp")
    dog = next(s for s in synsets if s.wnid == "n02084071")
    assert dog.lemmas[0] == "dog" and len(dog.leaves) == 118


def test_the_table_is_small_and_carries_no_time() -> None:
    packed = wordnet.TABLE.read_bytes()
    assert len(packed) < 100_000
    assert packed[4:8] == bytes(4)  # the header's mtime
    assert set(json.loads(gzip.decompress(packed))) == {"classes", "hypernyms"}


def test_the_vocabulary_is_ordered_from_specific_to_general() -> None:
    vocabulary = TagVocabulary.imagenet()
    sizes = [len(m) for m in vocabulary.members]
    assert sizes == sorted(sizes)
    assert vocabulary.membership.sum(0).tolist() == sizes
    assert len(vocabulary.names) == len(vocabulary.prompts) == 1000
    assert {"fish", "turtle", "dog", "edible fruit", "garment"} <= set(vocabulary.kinds)
    assert not {"abstraction", "solid", "racer", "spermatophyte"} & set(vocabulary.kinds)
    assert vocabulary.names[264] == "Cardigan Welsh corgi" and vocabulary.names[474] == "cardigan"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hourglass", "an hourglass"),
        ("honeycomb", "a honeycomb"),
        ("unicycle", "a unicycle"),
        ("umbrella", "an umbrella"),
        ("ungulate", "an ungulate"),
        ("European gallinule", "a European gallinule"),
        ("utensil", "a utensil"),
        ("upright", "an upright"),
        ("iPod", "an iPod"),
        ("ox", "an ox"),
        ("corn", "corn"),
        ("binoculars", "binoculars"),
    ],
)
def test_articles_follow_the_sound(name: str, expected: str) -> None:
    assert with_article(name) == expected


def test_a_sentence_says_the_most_specific_kind_and_its_names() -> None:
    both = np.array([[0.72, 0.69, 0, 0]])
    assert describe(both, 10) == ["a picture of a fruit, like a pomegranate or an orange."]


def test_names_outside_the_kind_are_not_said() -> None:
    # Softmax of (3, 2.5, 2, -inf-like): the hammer has 0.19 and would be third without the kind.
    assert describe([[3, 2.5, 2, -9]], 1) == ["a picture of a fruit, like a pomegranate or an orange."]


def test_without_a_kind_the_names_stand_alone() -> None:
    vocabulary = TagVocabulary(FRUIT.names, ("fruit",), ((0, 1),))
    (text,) = describe_features(AXES[3:], vocabulary, AXES, 10.0)
    assert text == "a picture of something like an hourglass."


def test_the_likeliest_name_is_said_when_none_is_likely() -> None:
    vocabulary = TagVocabulary(tuple(f"name {i}" for i in range(50)), ("pair",), ((0, 1),))
    features = np.zeros((1, 50), np.float32)
    features[0, 17] = 0.01
    (text,) = describe_features(features, vocabulary, np.eye(50, dtype=np.float32), 1.0)
    assert text == "a picture of something like a name 17."


def test_equal_names_are_said_once() -> None:
    vocabulary = TagVocabulary(("crane", "crane"), ("thing",), ((0, 1),))
    (text,) = describe_features(np.ones((1, 2), np.float32), vocabulary, np.eye(2, dtype=np.float32), 1.0)
    assert text == "a picture of a thing, like a crane."


def test_the_domain_mean_takes_out_what_all_share() -> None:
    image = np.array([[0, 0, 0.8, 0.6]])
    mean = np.array([0, 0, 0.8, 0], np.float32)
    assert describe(image, 20) == ["a picture of a thing, like a hammer."]
    assert describe(image, 20, mean) == ["a picture of a thing, like an hourglass."]


def test_a_group_is_described_by_its_mean_direction() -> None:
    members = np.array([[0.9, 0, 0.44, 0], [0, 0.9, 0, 0.44]], np.float32)
    (text,) = describe_groups([members], FRUIT, AXES, 10.0)
    assert text == "pictures that have in common a fruit, like a pomegranate or an orange."
    with pytest.raises(ValueError, match="group of 0 images"):
        describe_groups([members, members[:0]], FRUIT, AXES, 10.0)


def test_a_sentence_depends_on_its_own_row_only() -> None:
    rng = np.random.default_rng(0)
    vocabulary = TagVocabulary.imagenet()
    names = rng.normal(size=(1000, 16)).astype(np.float32)
    features = rng.normal(size=(5000, 16)).astype(np.float32)  # more than one chunk
    together = describe_features(features, vocabulary, names, 1.0)
    assert len(together) == 5000 and len(set(together)) > 100
    assert together[4090:4100] == describe_features(features[4090:4100], vocabulary, names, 1.0)
    assert describe_features(features[:0], vocabulary, names, 1.0) == []
