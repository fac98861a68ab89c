"""The preparers, on the shipped demo and on tiny packages made here; the real packages only with `-m network`."""

import csv
import gzip
import hashlib
import json
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, PngImagePlugin

from latteflow.domains import clipart, emoji, fashion
from latteflow.domains.picture import Picture, grey_png, small_png, split_of, unique
from latteflow.domains.prepare import DOMAINS, RECORD, main, prepare
from latteflow.domains.sources import SourceError, deb_folder, npm_folder

# The demo's PNG files are not compressed, so they are the same on every machine; stages and caches may rely on it.
DEMO_SHA256 = "030ff30254c8"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(path: Path) -> dict[str, str]:
    with path.open(newline="") as file:
        reader = csv.reader(file)
        next(reader)
        return {key: value for key, value in reader}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared demo that no test changes."""
    data = tmp_path_factory.mktemp("data")
    assert prepare("demo", data, data)
    return data / "demo"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A `demo` of four pictures, for tests of what happens to folders."""

    def pictures(work: Path) -> Iterator[Picture]:
        for split, number in (("train", 1), ("train", 2), ("test", 1), ("test", 2)):
            png = grey_png(np.full((4, 4), number, np.uint8))
            yield Picture(split=split, name=str(number), png=png, label="coat", text=None)  # type: ignore[arg-type]

    monkeypatch.setitem(DOMAINS, "demo", (1, pictures))


def test_npz_needs_no_pickle_and_is_small() -> None:
    with np.load(fashion.DEMO, allow_pickle=False) as arrays:
        assert {name: (array.shape, array.dtype.name) for name, array in arrays.items()} == {
            "train_images": ((2000, 28, 28), "uint8"),
            "train_labels": ((2000,), "uint8"),
            "test_images": ((1000, 28, 28), "uint8"),
            "test_labels": ((1000,), "uint8"),
        }
    assert fashion.DEMO.stat().st_size < 2_000_000
    assert "Zalando SE" in (fashion.DEMO.parent / "LICENSE").read_text()


def test_demo_is_the_same_everywhere(demo: Path) -> None:
    files = {path: hashlib.sha256(content).hexdigest() for path, content in snapshot(demo).items() if path != RECORD}
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    assert digest.startswith(DEMO_SHA256)
    assert json.loads((demo / RECORD).read_text())["sha256"] == digest


def test_two_preparations_are_equal_byte_for_byte(demo: Path, small: None, tmp_path: Path) -> None:
    assert {picture.path: picture.png for picture in fashion.demo(tmp_path)}.items() <= snapshot(demo).items()
    for data in ("a", "b"):
        prepare("demo", tmp_path / data, tmp_path)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_demo_pixels(demo: Path) -> None:
    with np.load(fashion.DEMO, allow_pickle=False) as arrays:
        for split, count in (("train", 2000), ("test", 1000)):
            paths = sorted((demo / split).iterdir())
            assert len(paths) == count
            pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
            assert np.array_equal(pixels, arrays[f"{split}_images"])
        labels = rows(demo / "labels.csv")
        assert [labels[f"test/{path.name}"] for path in paths] == [fashion.CLASSES[i] for i in arrays["test_labels"]]


def test_labels_are_in_labels_csv_only(demo: Path) -> None:
    labels = rows(demo / "labels.csv")
    assert set(labels) == {f"test/{path.name}" for path in (demo / "test").iterdir()}
    assert set(labels.values()) == set(fashion.CLASSES)
    assert {path.name for path in demo.iterdir()} == {"train", "test", "labels.csv", RECORD}
    assert all(path.stem.isdigit() for path in demo.glob("*/*.png"))
    # Nor does the order tell: a neighbour has the same class about as often as any other image, 1 in 10.
    classes = [label for _, label in sorted(labels.items())]
    assert sum(a == b for a, b in pairwise(classes)) < 150
    record = (demo / RECORD).read_text()
    assert not any(name in record for name in fashion.CLASSES)


def test_second_run_does_nothing(small: None, tmp_path: Path) -> None:
    assert prepare("demo", tmp_path, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert not prepare("demo", tmp_path, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_added_files_stay_and_trigger_nothing(small: None, tmp_path: Path) -> None:
    prepare("demo", tmp_path, tmp_path)
    added = {"train/mine.jpg": b"mine", "train/holiday/other.png": b"other", "notes.txt": b"notes"}
    for path, content in added.items():
        (tmp_path / "demo" / path).parent.mkdir(exist_ok=True)
        (tmp_path / "demo" / path).write_bytes(content)
    assert not prepare("demo", tmp_path, tmp_path)
    (tmp_path / "demo" / RECORD).unlink()
    assert prepare("demo", tmp_path, tmp_path)
    assert added.items() <= snapshot(tmp_path / "demo").items()


@pytest.mark.parametrize("damage", ["no record", "broken record", "file missing", "file cut short"])
def test_half_written_folder_is_redone(small: None, tmp_path: Path, damage: str) -> None:
    prepare("demo", tmp_path, tmp_path)
    whole = snapshot(tmp_path / "demo")
    match damage:
        case "no record":
            (tmp_path / "demo" / RECORD).unlink()
        case "broken record":
            (tmp_path / "demo" / RECORD).write_text('{"version": 1, "fil')
        case "file missing":
            (tmp_path / "demo" / "train" / "2.png").unlink()
        case "file cut short":
            (tmp_path / "demo" / "labels.csv").write_bytes(b"path,cl")
    assert prepare("demo", tmp_path, tmp_path)
    assert snapshot(tmp_path / "demo") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_new_version_replaces_prepared_files_and_keeps_added_ones(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare("demo", tmp_path, tmp_path)
    (tmp_path / "demo" / "train" / "mine.png").write_bytes(b"mine")
    picture = Picture(split="test", name="new", png=b"new", label="coat")
    monkeypatch.setitem(DOMAINS, "demo", (2, lambda work: iter([picture])))
    assert prepare("demo", tmp_path, tmp_path)
    assert set(snapshot(tmp_path / "demo")) == {"train/mine.png", "test/new.png", "labels.csv", RECORD}


def test_failure_leaves_the_old_folder(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare("demo", tmp_path, tmp_path)
    before = snapshot(tmp_path)

    def failing(work: Path) -> Iterator[Picture]:
        yield Picture(split="train", name="1", png=b"half", label="coat")
        raise SourceError("the network is gone")

    monkeypatch.setitem(DOMAINS, "demo", (2, failing))
    with pytest.raises(SourceError, match="the network is gone"):
        prepare("demo", tmp_path, tmp_path)
    assert snapshot(tmp_path) == before


def test_killed_between_the_renames(small: None, tmp_path: Path) -> None:
    prepare("demo", tmp_path, tmp_path)
    (tmp_path / "demo" / "train" / "mine.png").write_bytes(b"mine")
    whole = snapshot(tmp_path / "demo")
    (tmp_path / "demo").rename(tmp_path / ".demo.replaced")
    (tmp_path / ".demo.new" / "train").mkdir(parents=True)
    prepare("demo", tmp_path, tmp_path)
    assert snapshot(tmp_path) == {f"demo/{path}": content for path, content in whole.items()}


def test_missing_tools_skip_with_one_message(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="domains.prepare")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["clipart", "--data", str(tmp_path)]) == 1
    assert "clipart skipped: `apt-get` is not installed" in caplog.text
    assert main(["demo", "emoji_animals", "--data", str(tmp_path)]) == 1
    assert main(["all", "--data", str(tmp_path)]) == 0
    assert [record.getMessage().split()[:2] for record in caplog.records[-5:]] == [
        ["demo", "unchanged"],
        ["fashion", "skipped:"],
        ["clipart", "skipped:"],
        ["emoji_coarse", "skipped:"],
        ["emoji_animals", "skipped:"],
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_unknown_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["clip-art", "--data", str(tmp_path)])
    assert error.value.code == 2
    assert "emoji_animals" in capsys.readouterr().err


def tool(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{script}\n")
    path.chmod(0o755)


def test_apt_without_lists_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    tool(tmp_path / "bin", "dpkg", "")
    tool(tmp_path / "bin", "apt-get", "import sys; sys.exit('E: Unable to locate package openclipart-png')")
    with pytest.raises(SourceError, match=r"Unable to locate package openclipart-png; .*run `apt-get update`"):
        deb_folder("openclipart-png", tmp_path)


def test_package_is_fetched_once_and_tar_members_stay_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    script = """
import io, sys, tarfile
with tarfile.open("x-1.0.0.tgz", "w:gz") as tar:
    member = tarfile.TarInfo(sys.argv[-1].split("@")[0])
    member.size = 2
    tar.addfile(member, io.BytesIO(b"{}"))
"""
    tool(tmp_path / "bin", "npm", script)
    assert (npm_folder("emoji.json", "1.0.0", tmp_path) / "emoji.json").read_bytes() == b"{}"
    tool(tmp_path / "bin", "npm", "raise SystemExit('asked again')")
    npm_folder("emoji.json", "1.0.0", tmp_path)
    tool(tmp_path / "bin", "npm", script)
    with pytest.raises(SourceError, match=r"npm package \.\./outside 1\.0\.0"):
        npm_folder("../outside", "1.0.0", tmp_path)
    assert not (tmp_path / "outside").exists()


def test_split_and_names_depend_on_the_key_alone() -> None:
    splits = Counter(split_of(f"drawing {number}") for number in range(10_000))
    assert 1_800 < splits["test"] < 2_200  # 5 standard deviations around a fifth
    assert {split_of("a", test_share=0.0), split_of("a", test_share=1.0)} == {"train", "test"}


def test_transparency_becomes_white_and_nothing_is_enlarged() -> None:
    image = Image.new("RGBA", (300, 150), (255, 0, 0, 0))
    assert small_png(image, 100) is None
    image.paste((0, 0, 255, 255), (0, 0, 150, 150))
    png = small_png(image, 100)
    assert png is not None
    first, second = (Picture(split="train", name=name, png=png, label="x") for name in "ab")
    assert [picture.name for picture in unique([first, second])] == ["a"]
    small_image = Image.open(BytesIO(png))
    assert (small_image.mode, small_image.size) == ("RGB", (100, 50))
    assert [small_image.getpixel(xy) for xy in ((10, 25), (90, 25))] == [(0, 0, 255), (255, 255, 255)]


def test_fashion_reads_idx_files(tmp_path: Path) -> None:
    folder = tmp_path / "deb" / fashion.PACKAGE / "usr/share/datasets/fashion-mnist"
    folder.mkdir(parents=True)
    images = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    for prefix in ("train", "t10k"):
        header = struct.pack(">BBBBIII", 0, 0, 8, 3, *images.shape)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(struct.pack(">BBBBIBB", 0, 0, 8, 1, 2, 9, 0))
        )
    pictures = list(fashion.fashion(tmp_path))
    assert [(picture.path, picture.label) for picture in pictures] == [
        ("train/1.png", "ankle boot"),
        ("train/2.png", "t-shirt"),
        ("test/1.png", "ankle boot"),
        ("test/2.png", "t-shirt"),
    ]
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"<html>"))
    with pytest.raises(SourceError, match="starts with 3c68746d"):
        list(fashion.fashion(tmp_path))


def test_clipart_takes_class_from_folder_and_text_from_file(tmp_path: Path) -> None:
    root = tmp_path / "deb" / clipart.PACKAGE / "usr/share/openclipart/png"

    def draw(path: str, color: str, **text: str) -> None:
        info = PngImagePlugin.PngInfo()
        for key, value in text.items():
            info.add_text(key, value)
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (400, 20), color).save(root / path, pnginfo=info)

    draw("animals/birds/owl.png", "red", Title="Owl", Description="An\n owl ")
    draw("animals/birds/owl_bw.png", "black", Title="Owl", Description="Owl")
    draw("animals/birds/penguin/tux.png", "blue", Description="HASH(0x8)")
    draw("animals/birds/blank.png", "white")
    draw("food/fruit/copy_of_owl.png", "red")
    draw("animals/birds/bat.png", "brown")
    (root / "animals/mammals").mkdir()
    (root / "animals/mammals/bat.png").symlink_to("../birds/bat.png")  # both a bird and a mammal: left out
    pictures = list(clipart.clipart(tmp_path))
    assert [(picture.label, picture.text) for picture in pictures] == [
        ("bird", "Owl. An owl"),
        ("bird", "Owl"),
        ("bird", None),
    ]
    assert pictures[0].split == pictures[1].split
    assert not any("owl" in picture.name for picture in pictures)


def test_emoji_kinds_hold_out_emoji_and_animals_hold_out_artists(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    package = {
        style: tmp_path / "npm" / s.package[0].replace("/", "+") / "package" for style, s in emoji.STYLES.items()
    }
    known = [(f"1F4{number:02X}", f"animal {number}") for number in range(20)]
    entries = [{"unified": code, "image": f"{code.lower()}.png", "subcategory": "animal-bug"} for code, _ in known]
    named = [{"hexcode": f"{code}-FE0F", "annotation": f"{name} face", "tags": "a,  b"} for code, name in known]
    for number, (code, name) in enumerate(known):
        for index, (style, s) in enumerate(emoji.STYLES.items()):
            file = package[style] / s.path.format(
                image=code.lower(), hexcode=f"{code}-FE0F", name=f"{name} face".replace(" ", "-")
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            color = (number, index, 0)
            if file.suffix == ".svg":
                rectangle = f'<rect width="9" height="9" fill="rgb{color}"/>'
                file.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9">{rectangle}</svg>')
            else:
                Image.new("RGB", (9, 9), color).save(file, lossless=True)
    (package["google"] / "emoji.json").write_text(json.dumps(entries))
    (package["openmoji"] / "data").mkdir()
    (package["openmoji"] / "data/openmoji.json").write_text(json.dumps(named))

    coarse = list(emoji.emoji_coarse(tmp_path))
    animals = list(emoji.emoji_animals(tmp_path))
    assert len(coarse) == len(animals) == 20 * 8
    assert {picture.label for picture in coarse} == {"insect"}
    assert coarse[0].text == "animal 0 face: a, b"
    splits_of_text: dict[str | None, set[str]] = {}
    for picture in coarse:
        splits_of_text.setdefault(picture.text, set()).add(picture.split)
    assert all(len(splits) == 1 for splits in splits_of_text.values())
    assert {picture.split for picture in coarse} == {"train", "test"}
    for _, name in known:
        of_animal = Counter(picture.split for picture in animals if picture.label == name)
        assert of_animal["test"] in (1, 2, 4)  # pictures by one artist
        assert of_animal.total() == 8


@pytest.mark.parametrize("name", DOMAINS)
def test_domain_file_names_the_prepared_folder_and_classes(name: str) -> None:
    folder = Path(fashion.__file__).parent
    domain = yaml.safe_load((folder / f"{name}.yaml").read_text())
    classes = domain["classes"]
    if isinstance(classes, str):
        classes = (folder / classes).read_text().splitlines()
    assert len(classes) == len(set(classes))
    expected = {
        "demo": set(fashion.CLASSES),
        "fashion": set(fashion.CLASSES),
        "clipart": set(clipart.FOLDERS),
        "emoji_coarse": set(emoji.COARSE.values()),
        "emoji_animals": set(classes),  # known from the packages only; see `test_real_packages`
    }
    assert set(classes) == expected[name]
    assert domain["name"] == name
    assert domain["source"] == f"../data/{name}/train"
    assert domain["evaluation"] == {"source": f"../data/{name}/test", "labels": f"../data/{name}/labels.csv"}


@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "n_train", "n_test", "n_classes"),
    [
        ("fashion", 60_000, 10_000, 10),
        ("clipart", 1_168, 288, 36),
        ("emoji_coarse", 3_679, 942, 24),
        ("emoji_animals", 672, 248, 94),
    ],
)
def test_real_packages(
    name: str, n_train: int, n_test: int, n_classes: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if "network" not in request.config.option.markexpr:
        pytest.skip("fetches packages; ask for it with -m network")
    assert main([name, "--data", str(tmp_path)]) == 0
    labels = rows(tmp_path / name / "labels.csv")
    assert len(list((tmp_path / name / "train").iterdir())) == n_train
    assert len(labels) == len(list((tmp_path / name / "test").iterdir())) == n_test
    assert len(set(labels.values())) == n_classes
    if name == "emoji_animals":
        listed = (Path(fashion.__file__).parent / "emoji_animals.txt").read_text().splitlines()
        assert set(labels.values()) == set(listed)
