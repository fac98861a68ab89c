"""Fingerprints: stable, complete, and explained."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latteflow.storage.fingerprint import canonical_json, difference, fingerprint

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), values, max_size=6))
def test_order_of_keys_does_not_matter(value: dict[str, object]) -> None:
    assert canonical_json(value) == canonical_json(dict(reversed(value.items())))
    assert json.loads(canonical_json(value).decode("utf-8", "surrogatepass")) == value


def test_known_value() -> None:
    # sha256 of {"inputs":{"a":1},"stage":"embed","version":1}, computed with sha256sum.
    assert fingerprint("embed", 1, {"a": 1}) == "594ca9ac6d93784c4dbb3cb4840984f3795dd0550a7daf22734f16f2d4311ab8"


def test_everything_counts() -> None:
    base = fingerprint("embed", 1, {"a": 1})
    assert (
        len({base, fingerprint("tune", 1, {"a": 1}), fingerprint("embed", 2, {"a": 1}), fingerprint("embed", 1, {})})
        == 4
    )


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", object()])
def test_what_json_cannot_carry_is_refused(value: object) -> None:
    with pytest.raises(TypeError):
        canonical_json({"x": value})


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))


def test_a_difference_names_the_part() -> None:
    old = {"clip": {"model": "embedded", "resize": "pad"}, "size": 4}
    new = {"clip": {"model": "ViT-B-32", "resize": "pad"}, "size": 4, "extra": True}
    assert difference(old, new) == ['clip.model: "embedded" -> "ViT-B-32"', 'extra: "(none)" -> true']


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (["a", "b"], ["a", "c", "d"], 'x: added 2 of 3: "c", "d"; removed "b"'),
        (["a", "b"], ["b", "a"], "x: the same in another order"),
        (["a"], [["b"]], r'x: added \["b"\]; removed "a"'),
        ([], list("abcd"), r'x: added 4 of 4: "a", "b", "c", \.{3}'),
        ("y" * 90 + "1" + "z" * 90, "y" * 90 + "2" + "z" * 90, r"x: \.{3}y{19,20}1z+\.{3} -> \.{3}y{19,20}2z+\.{3}"),
        ("y" * 90, "y" * 90 + "2", r'x: \.{3}y+" -> \.{3}y+2"'),
    ],
)
def test_a_difference_shows_what_differs(old: object, new: object, line: str) -> None:
    assert re.fullmatch(line, difference({"x": old}, {"x": new})[0])


@given(values, values)
def test_a_difference_is_said_of_any_two_values(old: object, new: object) -> None:
    assert bool(difference({"x": old}, {"x": new})) == (canonical_json(old) != canonical_json(new))
