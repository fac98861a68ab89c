"""Emoji in eight drawing styles by four artists: the domains `emoji_coarse` (24 kinds) and `emoji_animals`."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from latteflow.domains.picture import Picture, Split, opaque_name, small_png, split_of, unique
from latteflow.domains.sources import SourceError, npm_folder

SIDE_PX = 128

GOOGLE, TWITTER, OPENMOJI, FLUENT, FLUENT_3D = (
    ("emoji-datasource-google", "16.0.0"),
    ("emoji-datasource-twitter", "16.0.0"),
    ("openmoji", "17.0.0"),
    ("fluentui-emoji", "1.3.0"),
    ("@lobehub/fluent-emoji-3d", "1.1.0"),
)
"""npm packages and versions."""


@dataclass(frozen=True)
class Style:
    """One way of drawing every emoji. Styles of one artist show the same drawing."""

    artist: str
    package: tuple[str, str]
    path: str
    """File in the package: `{image}` code points as emoji-datasource writes them, `{hexcode}` as OpenMoji does,
    `{name}` the Unicode name in lower case with hyphens."""


STYLES = {
    "google": Style("google", GOOGLE, "img/google/64/{image}.png"),
    "twitter": Style("twitter", TWITTER, "img/twitter/64/{image}.png"),
    "openmoji": Style("openmoji", OPENMOJI, "color/svg/{hexcode}.svg"),
    "openmoji-line": Style("openmoji", OPENMOJI, "black/svg/{hexcode}.svg"),
    "fluent": Style("fluent", FLUENT, "icons/modern/{name}.svg"),
    "fluent-flat": Style("fluent", FLUENT, "icons/flat/{name}.svg"),
    "fluent-line": Style("fluent", FLUENT, "icons/high-contrast/{name}.svg"),
    "fluent-3d": Style("fluent", FLUENT_3D, "assets/{image}.webp"),
}
ARTISTS = ("google", "twitter", "openmoji", "fluent")

COARSE = {
    "animal-mammal": "mammal",
    "animal-bird": "bird",
    "animal-marine": "sea animal",
    "animal-bug": "insect",
    "animal-reptile": "reptile or amphibian",
    "animal-amphibian": "reptile or amphibian",
    "plant-flower": "flower",
    "plant-other": "plant",
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "food-prepared": "meal",
    "food-asian": "Asian food",
    "food-sweet": "dessert",
    "drink": "drink",
    "clothing": "item of clothing",
    "musical-instrument": "musical instrument",
    "sport": "sport",
    "tool": "tool",
    "household": "household object",
    "book-paper": "book or paper",
    "place-building": "building",
    "sky & weather": "sky or weather",
    "transport-ground": "land vehicle",
    "transport-air": "aircraft",
    "transport-water": "boat",
}
"""Unicode subgroup to class name."""

SAME_ANIMAL = {
    "poodle": "dog",
    "guide dog": "dog",
    "service dog": "dog",
    "black cat": "cat",
    "ewe": "sheep",
    "ram": "sheep",
    "rooster": "chicken",
    "hatching chick": "baby chick",
    "front-facing baby chick": "baby chick",
    "tropical fish": "fish",
    "spouting whale": "whale",
    "dromedary camel": "camel",
    "two-hump camel": "camel",
    "sauropod": "dinosaur",
    "T-Rex": "dinosaur",
    "lady beetle": "ladybug",
}
"""Unicode name, without ` face`, to class name where the two differ."""

NO_ANIMAL = (
    {"paw prints", "pig nose", "spider web", "spiral shell", "coral", "feather", "wing", "microbe"}  # parts and things
    | {"bird", "black bird", "bug"}  # names that hold other classes
    | {"dragon", "phoenix", "unicorn"}  # fantasy
)


@dataclass(frozen=True)
class Emoji:
    """One emoji of Unicode, whoever draws it."""

    image: str
    hexcode: str
    name: str
    subgroup: str
    tags: str

    @property
    def text(self) -> str:
        """Name and annotations, as people search for it: `dog face: animal, dog, pet`."""
        return f"{self.name}: {self.tags}" if self.tags else self.name


@dataclass(frozen=True)
class Drawing:
    """A file that shows an emoji."""

    emoji: Emoji
    style: str
    path: Path


def emoji_coarse(work: Path) -> Iterator[Picture]:
    """24 kinds of things. All drawings of one emoji are on one side of the split, so test emoji are unseen."""
    return unique(
        _picture(drawing, label, split_of(drawing.emoji.image))
        for drawing in _drawings(work)
        if (label := COARSE.get(drawing.emoji.subgroup))
    )


def emoji_animals(work: Path) -> Iterator[Picture]:
    """94 animals, one or two emoji each, so whole emoji cannot be held out: of each emoji, one artist's drawings are.

    Styles of one artist stay together, so no test picture shows the same drawing as a training picture.
    """
    return unique(
        _picture(drawing, label, "test" if STYLES[drawing.style].artist == held_out_artist(drawing.emoji) else "train")
        for drawing in _drawings(work)
        if (label := animal(drawing.emoji))
    )


def held_out_artist(emoji: Emoji) -> str:
    """The artist whose drawings of this emoji are test pictures; each of the four equally often."""
    return ARTISTS[int(opaque_name(f"artist {emoji.image}"), 16) % len(ARTISTS)]


def animal(emoji: Emoji) -> str | None:
    """The animal an emoji shows, or None when it shows none, or too general a one."""
    name = emoji.name.removesuffix(" face")
    return None if not emoji.subgroup.startswith("animal-") or name in NO_ANIMAL else SAME_ANIMAL.get(name, name)


def _emoji(work: Path) -> list[Emoji]:
    """Emoji that both tables know, by code points."""
    google: list[dict[str, Any]] = json.loads((npm_folder(*GOOGLE, work) / "package/emoji.json").read_text("utf-8"))
    openmoji: list[dict[str, Any]] = json.loads(
        (npm_folder(*OPENMOJI, work) / "package/data/openmoji.json").read_text("utf-8")
    )
    named = {_code_points(entry["hexcode"]): entry for entry in openmoji}
    found = []
    for entry in sorted(google, key=lambda entry: entry["unified"]):
        if other := named.get(_code_points(entry["unified"])):
            tags = ", ".join(tag.strip() for tag in other["tags"].split(",") if tag.strip())
            image = entry["image"].removesuffix(".png")
            found.append(Emoji(image, other["hexcode"], other["annotation"], entry["subcategory"], tags))
    return found


def _code_points(text: str) -> str:
    """Code points without the variation selector, which the tables use differently."""
    return "-".join(point for point in text.upper().split("-") if point != "FE0F")


def _drawings(work: Path) -> Iterator[Drawing]:
    """Every file there is, emoji by emoji; no artist drew all of them."""
    folders = {name: npm_folder(*style.package, work) / "package" for name, style in STYLES.items()}
    for emoji in _emoji(work):
        name = re.sub(r"[^a-z0-9]+", "-", emoji.name.lower())
        for style, folder in folders.items():
            path = folder / STYLES[style].path.format(image=emoji.image, hexcode=emoji.hexcode, name=name)
            if path.exists():
                yield Drawing(emoji, style, path)


def _picture(drawing: Drawing, label: str, split: Split) -> Picture:
    name = opaque_name(f"{drawing.emoji.image} {drawing.style}")
    return Picture(split=split, name=name, png=_png(drawing.path), label=label, text=drawing.emoji.text)


def _png(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".svg":
        try:
            from resvg_py import svg_to_bytes
        except ImportError:
            raise SourceError("two emoji packages hold SVG drawings; `pip install resvg-py` draws them") from None
        data = svg_to_bytes(svg_string=data.decode(), width=SIDE_PX, height=SIDE_PX, skip_system_fonts=True)
    with Image.open(BytesIO(data)) as image:
        png = small_png(image, SIDE_PX)
    if png is None:
        raise SourceError(f"{path.name} is drawn all white; is resvg-py the current version?")
    return png
