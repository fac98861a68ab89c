"""Images of another kind: what adapting made the towers forget."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from latteflow.flows.pipeline import graph, run_plainly
from latteflow.storage.shards import read_index
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.errors import ConfigError
from latteflow.tasks.core.features import read_features
from latteflow.tasks.core.stage import open_store
from latteflow.tasks.report import forgetting
from latteflow.tasks.report.forgetting import general_answers
from latteflow.tasks.ship.export import export_tuned
from latteflow.tasks.tune.models import read_tuned
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


def by_open_clip(folder: Path, images: Path) -> dict[str, int]:
    """The class of each image by zero-shot with a folder, as open_clip's own README has it."""
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    preprocess = open_clip.image_transform(32, is_train=False)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")([f"a {name}" for name in CLASSES])
    found = {}
    with torch.no_grad():
        classifier = torch.nn.functional.normalize(model.eval().encode_text(tokens), dim=-1)
        for path in sorted(images.iterdir()):
            picture = Image.new("RGB", (40, 40), "white")
            picture.paste(Image.open(path), (0, 4))
            features = model.encode_image(preprocess(picture)[None])
            found[path.name] = int((features @ classifier.T).argmax())
    return found


def test_the_figures_are_those_of_the_exported_towers(with_general: Domain, tmp_path: Path) -> None:
    results = {each.label: each for each in run_plainly(with_general)}
    found = scores(with_general)["general"]
    assert (found["n"], found["classes"]) == (30, 4)
    assert found["methods"]["transduction"] == {"top1": found["top1"], "change": 0.0, "change_interval": [0.0, 0.0]}
    labels = ("tune", "shard general", "embed general")
    models, images, embedded = (open_store(with_general).open(results[label].ref) for label in labels)
    features, paths = read_features(embedded), dict(read_index(images).select("key", "path").iter_rows())
    said = []
    for seed in with_general.seeds:
        folder = tmp_path / f"model-{seed}"
        export_tuned(with_general, results["tune"], seed, folder, method="latteclip")
        theirs = by_open_clip(folder, tmp_path / "others")
        ours = general_answers(with_general, models, images, embedded, "latteclip", seed)
        assert {paths[key]: answer for key, answer in zip(features.keys, ours.tolist(), strict=True)} == theirs
        colours = ["red", "green", "blue"]
        said.append(np.mean([CLASSES[answer] == colours[int(path[:3]) % 3] for path, answer in theirs.items()]))
    assert found["methods"]["latteclip"]["top1"] == pytest.approx(np.mean(said))
    assert found["methods"]["latteclip"]["change"] == pytest.approx(np.mean(said) - found["top1"])
    assert "What it forgot" in (Path(with_general.output) / "shapes" / "report.html").read_text()


def test_a_learnt_map_and_the_tuned_text_tower_take_part(with_general: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    results = {each.label: each for each in run_plainly(with_general)}
    labels = ("tune", "shard general", "embed general")
    models, images, embedded = (open_store(with_general).open(results[label].ref) for label in labels)
    found, model = read_features(embedded), read_tuned(models, "latteclip", 0)
    change, texts = np.random.default_rng(1).normal(size=(2, *model.image_map.shape)).astype(np.float32)
    changed = replace(model, image_map=change, text_map=texts)
    monkeypatch.setattr(forgetting, "read_tuned", lambda *_: changed)
    answers = general_answers(with_general, models, images, embedded, "latteclip", 0)
    classes = found.class_features @ texts
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    assert (answers == (found.embeds @ change @ classes.T).argmax(1)).all()
    assert (answers != found.zero_shot).any()
    assert (answers != (found.embeds @ change @ found.class_features.T).argmax(1)).any()


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
    with pytest.raises(ConfigError, match=r"line 5: `evaluation.general.classes`: 1 given, at least 2"):
        Domain.load(file)
