"""The ten domains of the LatteCLIP paper, from your own copies of the data sets, with the paper's settings.

    python -m domains.paper eurosat --images EuroSAT/2750 --split EuroSAT/split_zhou_EuroSAT.json
    latteflow run data/eurosat/domain.yaml

The splits are those of CoOp (`split_zhou_<Name>.json`; `train` and `val` together are the unlabelled images), and for
fgvc_aircraft the data set's own lists: give the folder with `images_variant_trainval.txt` as `--split`. Images are
hard-linked where the file system can, else copied. `data/<name>/` then holds `train/`, `test/`, `labels.csv` (of the
test images), `classes.txt` and `domain.yaml`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

NAMES = (
    "caltech101", "dtd", "eurosat", "fgvc_aircraft", "flowers102", "food101", "oxford_pets", "stanford_cars", "sun397",
    "ucf101",
)  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """What differs between the paper's domains; settings are those of its released scripts.

    Attributes:
        n_train, n_test: images of the splits, to be told if yours differ.
        workers: of the loader, to whose multiple the steps of an epoch were rounded up.
    """

    n_train: int
    n_test: int
    epochs: int
    warmup: int
    template: str = "a photo of a {}."
    workers: int = 3
    weight_decay: float = 0.2


PRESETS: dict[str, Preset] = {
    "caltech101": Preset(5777, 2465, 50, 10, weight_decay=1e-7),
    "dtd": Preset(3948, 1692, 100, 10, "{} texture."),
    "eurosat": Preset(18900, 8100, 15, 40),
    "fgvc_aircraft": Preset(6667, 3333, 50, 15, "a photo of a {}, a type of aircraft."),
    "flowers102": Preset(5726, 2463, 50, 12, "a photo of a {}, a type of flower.", workers=4),
    "food101": Preset(70700, 30300, 15, 140, "a photo of a {}, a type of food."),
    "oxford_pets": Preset(3680, 3669, 100, 10),
    "stanford_cars": Preset(8144, 8041, 50, 20),
    "sun397": Preset(19850, 19850, 15, 40),
    "ucf101": Preset(9537, 3783, 50, 20, "a photo of a person doing {}"),
}

DOMAIN = """\
# {name}, as in the LatteCLIP paper (arXiv 2410.08211): its model, prompts, schedule and describer.
name: {name}
source: train
classes: classes.txt
templates: [{template}]
evaluation: {{source: test, labels: labels.csv}}
clip: {{model: ViT-B-32, pretrained: laion2b_s34b_b79k, centre: false}} # plain zero-shot, as in the paper
# The paper has this model in 4 bits. For texts by a server, or without a language model: docs/describers.md.
describer: {{kind: vllm, model: llava-hf/llava-v1.6-mistral-7b-hf, prompts: {name}, max_context: 4096}}
method: [latteclip, flyp]
latteclip:
  train: all
  batch_size: 512
  sampling: with_replacement
  step_multiple: {workers}
  epochs: {epochs}
  warmup: {warmup}
  weight_decay: {weight_decay}
# fp16 in the paper. Without micro_batch a batch takes some 20 GB of a GPU, with it less than 10.
training: {{precision: bfloat16, micro_batch: 256}}
"""


class SplitError(Exception):
    """A split file or an image it names is not as expected; the message says which, and what was expected."""


@dataclass(frozen=True)
class Split:
    """Image paths of the two splits, as the lists name them, and the classes.

    Attributes:
        train: paths.
        test: paths and numbers of classes.
        classes: names, by number.
    """

    train: list[str]
    test: list[tuple[str, int]]
    classes: list[str]


def read_coop(path: Path) -> Split:
    """A CoOp split: ``train``, ``val`` and ``test``, each a list of ``[path, class number, class name]``.

    Raises:
        SplitError: it is something else, or numbers and names of classes do not match.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = {part: [(str(image), int(label), str(name)) for image, label, name in found[part]] for part in _PARTS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SplitError(
            f"{path} is no CoOp split ({type(error).__name__}: {error}); expected an object with {', '.join(_PARTS)}, "
            "each a list of [path, class number, class name]"
        ) from error
    names: dict[int, str] = {}
    for _, label, name in (row for part in rows.values() for row in part):
        if names.setdefault(label, name) != name:
            raise SplitError(f"{path}: class {label} is {names[label]!r} and {name!r}; one number must have one name")
    if sorted(names) != list(range(len(names))):
        raise SplitError(f"{path}: classes must be numbered from 0 without gaps, got {sorted(names)[:5]}...")
    train = [image for part in ("train", "val") for image, _, _ in rows[part]]
    return Split(train, [(image, label) for image, label, _ in rows["test"]], [names[i] for i in range(len(names))])


_PARTS = ("train", "val", "test")


def read_aircraft(folder: Path) -> Split:
    """FGVC Aircraft's own lists: lines of an image number and a variant, which may hold spaces.

    Raises:
        SplitError: a list is missing or a line has no variant.
    """

    def lines(name: str) -> list[tuple[str, str]]:
        try:
            text = (folder / name).read_text(encoding="utf-8")
        except OSError as error:
            raise SplitError(f"{folder}: {name} is needed ({error}); it comes with the data set") from error
        pairs = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
        if wrong := [pair for pair in pairs if len(pair) != 2]:
            raise SplitError(f"{folder / name}: {wrong[0]} should be an image number and a variant")
        return [(f"{number}.jpg", variant.strip()) for number, variant in pairs]

    train, test = lines("images_variant_trainval.txt"), lines("images_variant_test.txt")
    classes = sorted({variant for _, variant in [*train, *test]})
    return Split([image for image, _ in train], [(image, classes.index(variant)) for image, variant in test], classes)


def write(name: str, split: Split, images: Path, target: Path) -> None:
    """Make ``target``, a folder of a domain.

    Raises:
        SplitError: images are missing or the folder exists; nothing is written then.
    """
    if target.exists():
        raise SplitError(f"{target} exists; remove it, or give another --data")
    missing = [path for path in [*split.train, *(path for path, _ in split.test)] if not _inside(images, path)]
    if missing:
        raise SplitError(
            f"{len(missing)} images of the split are not in {images}, for example {missing[0]}; "
            "give the folder that the paths of the split begin in"
        )
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    _link(images, split.train, fresh / "train")
    _link(images, [path for path, _ in split.test], fresh / "test")
    # The released conversion has these names without full stops.
    dotted = name in ("stanford_cars", "ucf101")
    classes = [each.replace(".", " ") if dotted else each for each in split.classes]
    (fresh / "classes.txt").write_text("".join(f"{each}\n" for each in classes), encoding="utf-8")
    with (fresh / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "class"), *((path, classes[label]) for path, label in split.test)])
    (fresh / "domain.yaml").write_text(domain_file(name), encoding="utf-8")
    fresh.rename(target)


def domain_file(name: str) -> str:
    """The text of a data set's ``domain.yaml``."""
    preset = PRESETS[name]
    return DOMAIN.format(
        name=name, template=json.dumps(preset.template), workers=preset.workers, epochs=preset.epochs,
        warmup=preset.warmup, weight_decay=preset.weight_decay,
    )  # fmt: skip


def _inside(images: Path, path: str) -> bool:
    parts = PurePosixPath(path)
    return not parts.is_absolute() and ".." not in parts.parts and (images / parts).is_file()


def _link(images: Path, paths: Iterable[str], target: Path) -> None:
    for path in dict.fromkeys(paths):
        place = target / path
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(images / path, place)
        except OSError:  # another file system, or one without links
            shutil.copyfile(images / path, place)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--images", type=Path, required=True, help="folder that the paths of the split begin in")
    parser.add_argument("--split", type=Path, required=True, help="CoOp's JSON file; for fgvc_aircraft a folder")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of all domains")
    args = parser.parse_args(argv)
    try:
        split = read_aircraft(args.split) if args.name == "fgvc_aircraft" else read_coop(args.split)
        write(args.name, split, args.images, args.data / args.name)
    except SplitError as error:
        parser.error(str(error))
    preset = PRESETS[args.name]
    found = len(split.train), len(split.test)
    parser.exit(
        message=f"{args.data / args.name}: {found[0]} images to adapt to, {found[1]} to test on"
        + ("" if found == (preset.n_train, preset.n_test) else f" (the paper: {preset.n_train}, {preset.n_test})")
        + f"; latteflow run {args.data / args.name / 'domain.yaml'}\n"
    )


if __name__ == "__main__":
    main()
