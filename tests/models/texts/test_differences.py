"""Answers about pairs: cleaned up, or rejected by a rule that has a name and a meaning."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latteflow.models.texts.differences import LEAST_CHARACTERS, RULES, read_difference

GOOD = "The first image shows a brown dog asleep on a sofa, while the second image shows two cats in a garden."


def test_a_good_answer_is_kept_as_it_is() -> None:
    for mode in ("compat", "recommended"):
        found = read_difference(f"A: {GOOD}\nQ: What is the visual", ["a brown dog on a sofa", "two cats"], mode)
        assert (found.text, found.rule) == (GOOD, None)


def test_lines_are_joined_with_a_space() -> None:
    text = read_difference(GOOD.replace(", while", ",\nwhile")).text
    assert text == GOOD


@pytest.mark.parametrize(
    ("raw", "rule"),
    [
        ("I'm sorry, but I cannot compare two images that I have not been shown, please provide them.", "refusal"),
        ("The first is a dog.", "too_short"),
        ("", "too_short"),
        (60 * "x", "loop"),
        (6 * "the dog is brown and ", "loop"),
        ("The first image shows " + ", ".join(f"{chr(97 + i)}{chr(119 - i % 20)}" for i in range(26)) * 2, "too_long"),
        (f"{GOOD} See https://example.org", "markup"),
        (f"<p>{GOOD}</p>", "markup"),
        (f"```{GOOD}```", "markup"),
        ("The first description mentions a dog asleep on a sofa, and the second one does not.", "speaks_of_captions"),
        ("A brown dog that is asleep on a red sofa beside a lamp and a window", "copies_caption"),
        (" The first image shows one small horse on a field, the second two cows in a stable.\n", "copies_prompt"),
        ("The first image shows one small horse in a field, the second two cows in a stable.", "copies_prompt"),
    ],
)
def test_each_rule_of_recommended(raw: str, rule: str) -> None:
    captions = ["a brown dog that is asleep on a red sofa beside a lamp and a window.", "two cats"]
    prompt = "Q: ...\nA: The first image shows one small horse on a field, the second two cows in a stable.\n\nQ:"
    assert read_difference(raw, captions, prompt=prompt).rule == rule


def test_other_languages_pass_unless_the_filter_is_compat() -> None:
    german = "Auf dem ersten Bild ist ein schläfriger Hund zu sehen, auf dem zweiten stehen zwei Kühe im Grünen."
    assert read_difference(german).rule is None
    assert read_difference(german, mode="compat").rule == "not_ascii"


@given(st.text(max_size=300), st.sampled_from(["compat", "recommended"]))
def test_anything_is_kept_or_has_a_rule_of_the_list(raw: str, mode: str) -> None:
    found = read_difference(raw, [raw], mode)
    assert found.rule in RULES if found.rule else len(found.text) >= LEAST_CHARACTERS
    assert "\n" not in found.text or found.rule


@given(st.text(alphabet="ab .,Q:#1A\n", min_size=60, max_size=200))
def test_what_was_cleaned_stays_clean(raw: str) -> None:
    once = read_difference(raw)
    if once.rule is None:
        assert "#" not in once.text and once.text == once.text.strip()
