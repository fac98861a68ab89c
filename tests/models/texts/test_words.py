"""The rule that compares words: what it says, and that it says nothing where there is nothing to say."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from latteflow.models.texts.describers import Item
from latteflow.models.texts.describers.words import Words, difference
from latteflow.models.texts.differences import LEAST_CHARACTERS


def test_each_side_is_told_what_the_other_lacks() -> None:
    found = difference("a picture of a red coat, like a jersey or a cloak.", "a picture of a coat with a hat")
    assert found.text == "The first image shows red, jersey, cloak, while the second image shows hat instead."
    found = difference("a dog", "a dog in the snow")
    assert found.text == "The first image does not show snow, which the second image does show."
    found = difference("a small brown dog", "a dog")
    assert found.text == "The first image shows small brown, which the second image does not show."


def test_the_same_words_make_no_difference() -> None:
    found = difference("a dog and a cat", "The picture of a Cat, with a dog.")
    assert found.text == "" and found.flags == ("missing",)


@given(st.text(max_size=80), st.text(max_size=80))
def test_what_is_said_passes_the_filter_for_length(first: str, second: str) -> None:
    text = difference(first, second).text
    assert not text or len(text) >= LEAST_CHARACTERS
    swapped = difference(second, first).text
    assert bool(text) == bool(swapped) and (not text or text != swapped)


def test_an_item_has_two_captions() -> None:
    item = Item((), lambda: None, lambda: [], "", 0, ("red", "blue"))  # type: ignore[arg-type, return-value]
    (found,) = Words().describe("pair", [item, item])
    assert found[0] == found[1] and "red, while" in found[0].text
