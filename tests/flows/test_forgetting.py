"""Images of another kind: what adapting made the towers forget."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from flows.pipeline import graph, run_plainly
from tasks.domain import ConfigError, Domain
from tasks.export import export_tuned
from tests.conftest import draw_folder

pytestmark = pytest.mark.slow
CLASSES = ["blue", "red", "a grey cat", "green"]


@pytest.fixture
def with_general(domain: Domain, tmp_path: Path) -> Domain:
    """The domain with other pictures, of classes in another order, in a folder of their own."""
    truth = draw_folder(tmp_path / "others", 30, first=300)
    (tmp_path / "others.csv").write_text("path,class\n" + "".join(f"others/{p},{name}\n" for p, name in truth.items()))
    (tmp_path / "others.txt").write_text("\n".join(CLASSES))
    file = tmp_path / "domain.yaml"
    general = '{source: others, labels: others.csv, classes: others.txt, templates: "a {}"}'
    text = file.read_text().replace("labels: labels.csv", f"labels: labels.csv, general: {general}")
    file.write_text(text.replace("method: [latteclip]", "method: [transduction, latteclip]"))
    return Domain.load(file)


def scores(domain: Domain) -> dict:
    return json.loads((Path(domain.output) / "shapes" / "metrics.json").read_text())


def by_open_clip(folder: Path, images: Path) -> float:
    """Zero-shot accuracy of a folder as open_clip's own README has it."""
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    preprocess = open_clip.image_transform(32, is_train=False)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")([f"a {name}" for name in CLASSES])
    right = []
    with torch.no_grad():
        classifier = torch.nn.functional.normalize(model.eval().encode_text(tokens), dim=-1)
        for path in sorted(images.iterdir()):
            picture = Image.new("RGB", (40, 40), "white")
            picture.paste(Image.open(path), (0, 4))
            features = model.encode_image(preprocess(picture)[None])
            answer = int((features @ classifier.T).argmax())
            right.append(CLASSES[answer] == ["red", "green", "blue"][int(path.stem) % 3])
    return float(np.mean(right))


def test_the_figures_are_those_of_the_exported_towers(with_general: Domain, tmp_path: Path) -> None:
    results = run_plainly(with_general)
    found = scores(with_general)["general"]
    assert (found["n"], found["classes"]) == (30, 4)
    assert found["methods"]["transduction"] == {"top1": found["top1"], "change": 0.0, "change_interval": [0.0, 0.0]}
    tuned = next(each for each in results if each.label == "tune")
    said = []
    for seed in with_general.seeds:
        export_tuned(with_general, tuned, seed, tmp_path / f"model-{seed}", method="latteclip")
        said.append(by_open_clip(tmp_path / f"model-{seed}", tmp_path / "others"))
    assert found["methods"]["latteclip"]["top1"] == pytest.approx(np.mean(said))
    assert found["methods"]["latteclip"]["change"] == pytest.approx(np.mean(said) - found["top1"])
    assert "What it forgot" in (Path(with_general.output) / "shapes" / "report.html").read_text()


def test_they_change_nothing_before_the_evaluation(domain: Domain, with_general: Domain, tmp_path: Path) -> None:
    def digests(each: Domain) -> dict[str, str]:
        return {result.label: result.ref.digest for result in run_plainly(each)}

    with_them = digests(with_general)
    assert with_general.evaluation
    without = digests(
        with_general.model_copy(update={"evaluation": with_general.evaluation.model_copy(update={"general": None})})
    )
    assert {label for label in with_them if with_them[label] != without.get(label)} == {
        "shard general", "embed general", "evaluate", "report",
    }  # fmt: skip
    labels = tmp_path / "others.csv"
    labels.write_text(labels.read_text().replace(",red", ",blue"))
    poisoned = digests(with_general)
    assert {label for label in with_them if with_them[label] != poisoned[label]} == {"evaluate", "report"}


def test_the_graph_has_them(with_general: Domain) -> None:
    assert [step.label for step in graph(with_general)][-4:] == ["shard general", "embed general", "evaluate", "report"]


def test_mistakes_are_told_with_their_place(with_general: Domain, tmp_path: Path) -> None:
    file = tmp_path / "domain.yaml"
    file.write_text(file.read_text().replace("classes: others.txt", "classes: [cat]"))
    with pytest.raises(ConfigError, match=r"line 5: `evaluation.general` `classes`: 1 given, at least 2"):
        Domain.load(file)
