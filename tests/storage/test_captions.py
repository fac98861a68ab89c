"""The caption store: every text once, whoever wrote it how often."""

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.captions import CAPTION_SCHEMA, CaptionStore, caption_key, describer_id
from storage.objects import ObjectStore

WHO = describer_id({"kind": "image", "model": "m", "revision": "1"})


def rows(texts: dict[str, str]) -> pl.DataFrame:
    made = [
        {
            "caption_key": caption_key(WHO, [image]), "kind": "image", "members": [image], "text": text, "flags": [],
            "finish_reason": "stop", "prompt_tokens": 3, "output_tokens": 4,
            "model": "m", "revision": "1", "prompt_id": "p",
        }
        for image, text in texts.items()
    ]  # fmt: skip
    return pl.DataFrame(made, schema=CAPTION_SCHEMA)


@pytest.fixture
def objects(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ObjectStore:
    return ObjectStore(str(tmp_path_factory.mktemp("store")))


def test_a_text_is_seen_once_however_often_it_was_written(objects: ObjectStore) -> None:
    captions = CaptionStore(objects)
    captions.add(WHO, rows({"a": "one", "b": "two"}))
    captions.add(WHO, rows({"b": "two", "a": "one"}))
    captions.add(WHO, rows({"b": "another worker said this", "c": "three"}))
    keys = {image: caption_key(WHO, [image]) for image in "abcd"}
    found = captions.get(WHO, keys.values())
    assert found["caption_key"].to_list() == sorted(keys[image] for image in "abc")
    assert captions.get(WHO, keys.values()).equals(found)


def test_two_describers_never_mix(objects: ObjectStore) -> None:
    captions = CaptionStore(objects)
    captions.add(WHO, rows({"a": "one"}))
    other = describer_id({"kind": "image", "model": "m", "revision": "2"})
    assert captions.get(other, [caption_key(other, ["a"]), caption_key(WHO, ["a"])]).height == 0


@given(st.lists(st.text(), min_size=1, max_size=4), st.integers(0, 3))
def test_a_key_is_of_content_order_and_index(members: list[str], index: int) -> None:
    key = caption_key(WHO, members, index)
    assert len(key) == 64
    assert key != caption_key(WHO, members, index + 1)
    assert key != caption_key(WHO, [*members, "x"], index)
    assert (key == caption_key(WHO, members[::-1], index)) == (members == members[::-1])


@given(st.dictionaries(st.text(max_size=5), st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=8))
def test_any_text_comes_back(texts: dict[str, str]) -> None:
    captions = CaptionStore(ObjectStore("memory://captions"))
    captions.add(WHO, rows(texts))
    keys = {caption_key(WHO, [image]): text for image, text in texts.items()}
    captions_found = CaptionStore(ObjectStore("memory://captions")).get(WHO, keys)
    assert set(captions_found["caption_key"]) == set(keys)
