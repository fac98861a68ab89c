"""Which model is kept, and who is asked about it."""

import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from conftest import draw_folder
from latteflow.flows.pipeline import run_plainly
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import open_store
from latteflow.tasks.tune.select import Judged, read_selection

TEXTS = "describer: {kind: sidecar, texts: texts.csv}"
FEW = "latteclip: {epochs: 4, batch_size: 8}"


@pytest.fixture
def truth(tmp_path: Path) -> dict[str, str]:
    return draw_folder(tmp_path / "train", 120)


def judged(
    folder: Path, clip: Path, texts: Mapping[str, str], more: str = TEXTS, methods: str = "latteclip_plus, transduction"
) -> dict[str, Judged]:
    """Of a run on the pictures with these classes in their texts. The tower has random weights, so that zero-shot knows
    nothing, but a text about a class is nearest to its name."""
    lines = "".join(f"train/{path},a {name} shape.\n" for path, name in texts.items())
    (folder / "texts.csv").write_text(f"path,text\n{lines}")
    (folder / "domain.yaml").write_text(
        "name: shapes\nsource: train\nclasses: [red, green, blue]\ntemplates: ['a {} shape.']\n"
        f"clip: {{model: {clip}, resize: pad}}\nmethod: [{methods}]\nseeds: [0]\nstore: store\noutput: runs\n{more}\n"
    )
    domain = Domain.load(folder / "domain.yaml")
    made = {each.label: each for each in run_plainly(domain)}
    return {each.method: each for each in read_selection(open_store(domain).open(made["select"].ref)).models}


def test_texts_that_know_the_classes_are_heard(tmp_path: Path, tiny_clip: Path, truth: dict[str, str]) -> None:
    found = judged(tmp_path, tiny_clip, truth, f"{TEXTS}\n{FEW}")
    assert found["latteclip_plus"].accepted
    assert all("the images' texts" in each.reason for each in found.values())


@pytest.mark.parametrize("describer", [TEXTS, "describer: {kind: tags}"])
def test_texts_of_other_images_and_tags_are_not(
    tmp_path: Path, tiny_clip: Path, truth: dict[str, str], describer: str
) -> None:
    texts = list(truth.values())
    random.Random(0).shuffle(texts)
    found = judged(tmp_path, tiny_clip, dict(zip(truth, texts, strict=True)), f"{describer}\n{FEW}")
    assert not any("the images' texts" in each.reason for each in found.values())


def test_towers_are_not_trained_again_to_hear_texts(tmp_path: Path, tiny_clip: Path, truth: dict[str, str]) -> None:
    more = f"{TEXTS}\nlatteclip: {{epochs: 1, batch_size: 60, train: last_blocks}}"
    found = judged(tmp_path, tiny_clip, truth, more, "latteclip, transduction")
    assert "the images' texts" in found["transduction"].reason
    assert "the images' texts" not in found["latteclip"].reason
