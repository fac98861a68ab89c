"""The paper's domains: their splits are read, their settings are a domain file that loads; mistakes lose nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from latteflow.domains.paper import NAMES, PRESETS, SplitError, main, read_aircraft, read_coop, write
from latteflow.models.texts.prompts import load
from latteflow.tasks.core.domain import Domain

ROWS = {
    "train": [["forest/1.jpg", 1, "Forest"], ["crop/2.jpg", 0, "Annual_Crop"]],
    "val": [["crop/3.jpg", 0, "Annual_Crop"]],
    "test": [["forest/4.jpg", 1, "Forest"], ["crop/5.jpg", 0, "Annual_Crop"]],
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "given"
    for rows in ROWS.values():
        for path, _, _ in rows:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(path.encode())
    (tmp_path / "split.json").write_text(json.dumps(ROWS))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_paper_s_settings(name: str, images: Path, tmp_path: Path) -> None:
    write(name, read_coop(tmp_path / "split.json"), images, tmp_path / name)
    domain = Domain.load(tmp_path / name / "domain.yaml")
    assert domain.templates == [PRESETS[name].template] and domain.classes == ["Annual_Crop", "Forest"]
    cfg, preset = domain.latteclip, PRESETS[name]
    assert (cfg.train, cfg.batch_size, cfg.peak_lr, cfg.alpha, cfg.trains_texts) == ("all", 512, 1e-7, 0.01, True)
    assert cfg.first_scale(100.0) == 100 and cfg.weight_decay == preset.weight_decay
    assert domain.prompt_pack == load(name)
    # Steps of the whole run, from the method's table.
    steps = dict(zip(NAMES, (600, 900, 585, 750, 600, 2115, 900, 900, 585, 1050), strict=True))
    assert cfg.n_epochs(preset.n_train) * cfg.n_steps(preset.n_train) == steps[name]
    assert cfg.warmup == preset.warmup


def test_a_split_becomes_a_domain(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eurosat", "--images", str(images), "--split", str(tmp_path / "split.json"), "--data", str(tmp_path)]
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    assert "3 images to adapt to, 2 to test on (the paper: 18900, 8100)" in capsys.readouterr().err
    made = tmp_path / "eurosat"
    files = sorted(path.relative_to(made).as_posix() for path in made.rglob("*.jpg"))
    assert files == [
        "test/crop/5.jpg",
        "test/forest/4.jpg",
        "train/crop/2.jpg",
        "train/crop/3.jpg",
        "train/forest/1.jpg",
    ]
    assert (made / "labels.csv").read_text().split() == ["path,class", "forest/4.jpg,Forest", "crop/5.jpg,Annual_Crop"]
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "exists" in capsys.readouterr().err


def test_full_stops_leave_names_where_the_paper_had_none(images: Path, tmp_path: Path) -> None:
    rows = {
        part: [[p, label, "Ram C.V" if label else "Geo 1.0"] for p, label, _ in each] for part, each in ROWS.items()
    }
    (tmp_path / "dots.json").write_text(json.dumps(rows))
    for name, expected in (("stanford_cars", "Geo 1 0\nRam C V\n"), ("sun397", "Geo 1.0\nRam C.V\n")):
        write(name, read_coop(tmp_path / "dots.json"), images, tmp_path / name)
        assert (tmp_path / name / "classes.txt").read_text() == expected


def test_aircraft_have_lists_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "images_variant_trainval.txt").write_text("0034309 A340-300\n1025794 707-320\n")
    (tmp_path / "images_variant_test.txt").write_text("1514522 Cessna 172\n\n0000001 707-320\n")
    found = read_aircraft(tmp_path)
    assert found.train == ["0034309.jpg", "1025794.jpg"] and found.classes == ["707-320", "A340-300", "Cessna 172"]
    assert found.test == [("1514522.jpg", 2), ("0000001.jpg", 0)]
    (tmp_path / "images_variant_test.txt").write_text("1514522\n")
    with pytest.raises(SplitError, match="should be an image number and a variant"):
        read_aircraft(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "is no CoOp split"),
        ("[]", "is no CoOp split"),
        ('{"train": [], "test": []}', "KeyError: 'val'"),
        ('{"train": [["a.jpg", 0]], "val": [], "test": []}', "is no CoOp split"),
        ('{"train": [["a", 0, "x"], ["b", 0, "y"]], "val": [], "test": []}', "class 0 is 'x' and 'y'"),
        ('{"train": [["a", 1, "x"]], "val": [], "test": []}', "numbered from 0"),
    ],
)
def test_other_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(SplitError, match=message):
        read_coop(tmp_path / "split.json")


@pytest.mark.parametrize("path", ["forest/9.jpg", "../secret", "/etc/passwd"])
def test_images_must_be_in_the_folder(path: str, images: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("")
    rows = {**ROWS, "train": [[path, 0, "Annual_Crop"]]}
    (tmp_path / "split.json").write_text(json.dumps(rows))
    with pytest.raises(SplitError, match="1 images of the split are not in"):
        write("dtd", read_coop(tmp_path / "split.json"), images, tmp_path / "dtd")
    assert not (tmp_path / "dtd").exists()
