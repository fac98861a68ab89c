"""Open Clip Art drawings (public domain), the domain `clipart`: the class is the folder a drawing is filed under."""

import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from latteflow.domains.picture import Picture, opaque_name, small_png, split_of, unique
from latteflow.domains.sources import SourceError, deb_folder

PACKAGE = "openclipart-png"
SIDE_PX = 256

FOLDERS = {
    "bird": "animals/birds",
    "insect": "animals/bugs",
    "dinosaur": "animals/dinosaurs",
    "sea animal": "animals/fish",
    "mammal": "animals/mammals",
    "house": "buildings/homes",
    "book": "education/books",
    "light bulb": "electronics/bulb",
    "drink": "food/beverages",
    "dessert": "food/desserts",
    "fruit": "food/fruit",
    "meat or egg dish": "food/meats_and_eggs",
    "vegetable": "food/vegetables",
    "telephone": "office/telephone",
    "part of the body": "people/bodypart",
    "hat": "people/clothing/hats",
    "smiley face": "people/smilies",
    "stick figure": "people/stickmen",
    "flower": "plants/flowers",
    "tree": "plants/trees",
    "playing card": "recreation/games/cards/white",
    "chess piece": "recreation/games/chess",
    "musical instrument": "recreation/music",
    "sport": "recreation/sports",
    "toy": "recreation/toys",
    "planet or moon": "geography/astronomy",
    "arrow": "shapes/arrows",
    "speech bubble": "shapes/callouts",
    "clock": "signs_and_symbols/clocks",
    "flag": "signs_and_symbols/flags/africa",
    "weather": "signs_and_symbols/weather",
    "weapon": "tools/weapons",
    "sailing boat": "transportation/boating",
    "road sign": "transportation/roadsigns",
    "vehicle": "transportation/vehicles",
    "computer hardware": "computer/hardware",
}
"""Class name to folder of the package, subfolders included."""


def clipart(work: Path) -> Iterator[Picture]:
    """Every visible drawing filed under exactly one class, once, with its title and description."""
    return unique(_pictures(work))


def _pictures(work: Path) -> Iterator[Picture]:
    root = deb_folder(PACKAGE, work) / "usr/share/openclipart/png"
    for path, label in _filed_under_one(root).items():
        key = path.relative_to(root).as_posix()
        try:
            drawing = _read(path)
        except OSError as error:
            raise SourceError(f"{key} of {PACKAGE} cannot be read ({error}); fetch the package again") from error
        if drawing is None:
            continue
        png, text = drawing
        # A drawing and its black-and-white version stay on one side of the split.
        split = split_of(key.replace("_bw", ""))
        yield Picture(split=split, name=opaque_name(key), png=png, label=label, text=text)


def _read(path: Path) -> tuple[bytes, str | None] | None:
    """PNG bytes and text of a drawing; None when it is too large to decode safely, or all white."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # above 89 million pixels
        try:
            with Image.open(path) as image:
                png = small_png(image, SIDE_PX)
                return None if png is None else (png, _text(image))
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            return None


def _filed_under_one(root: Path) -> dict[Path, str]:
    """Drawings with their class. The package files a drawing twice by a link; two classes are no class."""
    labels: dict[Path, set[str]] = {}
    for label, folder in FOLDERS.items():
        for path in (root / folder).rglob("*.png"):
            labels.setdefault(path.resolve(), set()).add(label)
    if not labels:
        raise SourceError(f"{PACKAGE} holds none of the expected folders under {root.name}; is it a newer release?")
    return {path: min(names) for path, names in sorted(labels.items()) if len(names) == 1}


def _text(image: Image.Image) -> str | None:
    """Title and description, as the drawing's author wrote them into the file."""
    fields = [" ".join(str(image.info.get(name, "")).split()) for name in ("Title", "Description")]
    kept = [field for field in fields if field and not field.startswith("HASH(")]  # a printed Perl reference
    return ". ".join(dict.fromkeys(kept)) or None
