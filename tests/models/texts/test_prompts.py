"""Prompt packs: the paper's questions to the letter, and one clear message for each mistake of a user's own."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latteflow.models.errors import ModelError
from latteflow.models.texts.prompts import fill, load, shipped

# The strings of LatteCLIP's code, commit 4b7d879: extract_captions_llava_1_6.py:188-200 about one image,
# extract_captions_llava_1_6_compare.py:365-381 about a group. Both end alike, and so do their beginnings.
END = "concisely, less than 20 words."
PAPER = {
    "caltech101": ("the object in the photo", "the objects in all the photos"),
    "dtd": ("the texture in the photo", "the textures in all the photos"),
    "eurosat": ("the land use in the satellite image", "the land use in all the satellite images"),
    "fgvc_aircraft": ("the aircraft in the photo", "the aircrafts in all the photos"),
    "flowers102": ("the {class} flower in the photo", "the flowers in all the photos"),
    "food101": ("the {class} food in the photo", "the foods in all the photos"),
    "oxford_pets": ("the pet in the photo", "the pets in all the photos"),
    "stanford_cars": ("the car in the photo", "the cars in all the photos"),
    "sun397": ("the scene in the photo", "the scenes in all the photos"),
    "ucf101": ("the action of the person in the photo", "the person's actions in all the photos"),
}

GOOD = """\
name: birds
version: 3
variables: [class]
image: Describe the {class}.
group: Describe them all.
"""


@pytest.mark.parametrize("name", PAPER)
def test_a_pack_of_the_paper_asks_what_its_code_asks(name: str) -> None:
    pack = load(name)
    image, group = PAPER[name]
    assert pack.image == (f"Describe {image} {END}",)
    assert pack.group == (f"Describe the common visual attributes of {group} {END}",)
    assert pack.classes == () and pack.id == f"{name}/1"


def test_every_shipped_pack_loads_and_is_called_like_its_file() -> None:
    assert shipped() == sorted([*PAPER, "base", "generic"])
    assert [load(name).name for name in shipped()] == shipped()


def own(tmp_path: Path, text: str) -> str:
    (tmp_path / "own.yaml").write_text(text, encoding="utf-8")
    return str(tmp_path / "own.yaml")


def test_a_users_pack(tmp_path: Path) -> None:
    pack = load(own(tmp_path, "\ufeff" + GOOD + "classes: |\n  What does a {class} look like?\n"))
    assert pack.id == "birds/3" and pack.image == ("Describe the {class}.",)
    assert pack.classes == ("What does a {class} look like?",)  # without the block's line break


@pytest.mark.parametrize(
    ("was", "becomes", "message"),
    [
        ("the {class}", "the {colour}", "{colour} is no variable; known: {class}"),
        ("the {class}", "the {}", "{} is no variable; known: {class}"),
        ("variables: [class]\n", "", "{class} is used and not declared; write `variables: [class]`"),
        ("the {class}", "it", "`variables` declares 'class', which no question uses"),
        ("[class]", "[class, color]", "{color} is no variable"),
        ("image: Describe the {class}.\n", "image: []\nclasses: the {class}\n", "`image` and `group` need"),
        ("them all.", "them all.\nclasses: [Describe it.]", "each question under `classes` needs {class}"),
        ("group: Describe them all.\n", "", "group: Field required"),
        ("group: Describe them all.", "group: '  '", "group.0: String should have at least 1 character"),
        ("group: Describe them all.", "group: 7", "group: "),
        ("name: birds", "name: Birds of prey", "name: "),
        ("version: 3", "version: 0", "version: "),
        ("version: 3", "version: 3\nimages: x", "images: Extra inputs are not permitted"),
        (GOOD, "", "pack: Input should be a valid dictionary"),
        (GOOD, "- a list", "pack: Input should be a valid dictionary"),
    ],
)
def test_a_mistake_is_one_line_of_the_message(tmp_path: Path, was: str, becomes: str, message: str) -> None:
    path = own(tmp_path, GOOD.replace(was, becomes))
    with pytest.raises(ModelError) as caught:
        load(path)
    first, *lines = str(caught.value).splitlines()
    assert first == f"prompt pack {path} has 1 mistake(s):" and len(lines) == 1
    assert message in lines[0]


def test_all_mistakes_are_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"4 mistake\(s\)") as caught:
        load(own(tmp_path, "name: birds\nverison: 1\nimage: ''\n"))
    for line in ("version: Field required", "verison: Extra", "image.0: ", "group: Field required"):
        assert f"\n  {line}" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["image: [unclosed", "name: a\nname: b", "a: 1\n---\nb: 2", "name: 2020-13-45", "a: !!python/object:b.C {}"]
)
def test_what_is_no_yaml_is_said(tmp_path: Path, text: str) -> None:
    with pytest.raises(ModelError, match=r"prompt pack .*own\.yaml cannot be read"):
        load(own(tmp_path, text))


def test_bytes_that_are_no_text_are_said(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelError, match="cannot be read: 'utf-8'"):
        load(str(tmp_path / "own.yaml"))


def test_a_pack_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"prompt pack 'genric': known are base, caltech101, .*generic"):
        load("genric")
    with pytest.raises(ModelError, match=r"there is no file .*none\.yaml"):
        load(str(tmp_path / "none.yaml"))
    with pytest.raises(ModelError, match="there is no file"):
        load(f"{tmp_path}/")


@pytest.mark.parametrize("name", ["{class}", "a{b}c", "{}", "AC/DC", r"back\slash \1 \g<0>", "猫 🐈", "'\"`", "$x %s"])
def test_a_class_name_is_filled_in_as_it_is(name: str) -> None:
    assert fill("Describe the {class} in {the photo}.", **{"class": name}) == f"Describe the {name} in {{the photo}}."


@given(st.lists(st.text(), min_size=1), st.text())
def test_fill_puts_the_name_between_the_pieces_and_changes_nothing_else(pieces: list[str], name: str) -> None:
    pieces = [piece.replace("{", "(").replace("}", ")") for piece in pieces]
    assert fill("{class}".join(pieces), **{"class": name}) == name.join(pieces)


PAIRED = GOOD.replace("[class]", "[class, first, second]")


def test_questions_about_pairs_are_there_and_can_be_replaced(tmp_path: Path) -> None:
    for name in shipped():
        assert {"{first}", "{second}"} == {
            word for word in ("{class}", "{first}", "{second}") if word in load(name).pair
        }
    pack = load(own(tmp_path, PAIRED + 'pair: "{first} or {second}?"\n'))
    assert fill(pack.pair, first="a {second} dog", second="x") == "a {second} dog or x?"
    assert "{first}" in pack.class_pair


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "pair: What about {first}?\nclass_pair: '{first} {second}'",
            "`pair` and `class_pair` need {first} and {second}",
        ),
        ("class_pair: '{class} {first} {second}'", "`pair` and `class_pair` need {first} and {second}"),
        ("classes: 'A {class} {first}?'\npair: '{first} {second}'", "{first} and {second} are for `pair`"),
    ],
)
def test_mistakes_in_questions_about_pairs(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        load(own(tmp_path, PAIRED + line + "\n"))
    assert message in str(caught.value)
