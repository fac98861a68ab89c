"""Golden checks of PC-CLIP's description (section 10): every number of it, and those that must not come out."""

from __future__ import annotations

import pytest

from models.differences import read_difference
from models.pairs import unrank

KEPT_1 = "The clock on the building is much larger than the clocks on the wall, and it stands outdoors."
KEPT_3 = "The first image shows two zebras grazing in tall grass, while the second shows a lone giraffe near trees."
KEPT_5 = "The first image shows a man on a surfboard riding a wave in the ocean."
RAW_6 = (
    ". The first picture is taken at night with street lamps lit,\nwhile the second\tpicture is taken  in daylight "
    "at a harbour."
)
KEPT_6 = (
    "The first picture is taken at night with street lamps lit,while the second picture is taken in daylight at a "
    "harbour."
)
LONG = "The first image shows a street at night, while the second image shows a field by day"


@pytest.mark.parametrize(
    ("raw", "text", "length"),
    [
        (f"A: {KEPT_1}", KEPT_1, 93),
        (f"{KEPT_3} Note: captions only.", KEPT_3, 105),
        (f"#1: {KEPT_5} #2: The second ...", KEPT_5, 70),
        (RAW_6, KEPT_6, 117),
        (60 * "x", 60 * "x", 60),
    ],
)
def test_g4_kept(raw: str, text: str, length: int) -> None:
    found = read_difference(raw, mode="compat")
    assert (found.text, found.rule, len(found.text)) == (text, None, length)


@pytest.mark.parametrize(
    ("raw", "rule"),
    [
        ("A: The first image shows a red bus on a street.\nQ: What is ...", "too_short"),
        (f"{LONG} at a café.", "not_ascii"),
        (f"* {LONG}.", "asterisk"),
        (f"\n\n\n{LONG}.", "blank_start"),
        (f" \n\n\n{LONG}.", "blank_start"),
        (f"Description: {LONG}.", "prompt_echo"),
        (f"{LONG} of 1000000 flowers.", "digit_or_symbol_run"),
        (59 * "y", "too_short"),
    ],
)
def test_g4_rejected(raw: str, rule: str) -> None:
    assert read_difference(raw, mode="compat").rule == rule


def test_g5_pair_numbers() -> None:
    i, j = unrank([0, 3, 4, 6, 9], 5)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == [(0, 1), (0, 4), (1, 2), (1, 4), (3, 4)]
    i, j = unrank([999, 250000, 499499], 1000)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == [(1, 2), (293, 365), (998, 999)]
