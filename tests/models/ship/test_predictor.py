"""An exported folder as a predictor: what it says, what it refuses, and the same model in other formats."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import draw
from latteflow.models.errors import ModelError
from latteflow.models.settings import ClipSettings
from latteflow.models.ship.predictor import Head, Predictor, scores, unknown_below
from latteflow.models.towers import clip


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "model")


def test_it_says_what_the_formula_says(exported: Path) -> None:
    model = Predictor.load(exported)
    images = [draw(number, "red") for number in range(3)]
    found = model.predict([image.copy() for image in images])
    head = load_file(exported / "classifier.safetensors")
    embeds = model.clip.image_embeds(torch.stack([model.clip.preprocess(image) for image in images]))
    logits = 20 * torch.nn.functional.normalize(embeds - head["centre"]) @ head["prototypes"].T
    np.testing.assert_allclose(found.probabilities[:, 0], logits.softmax(1).max(1).values, atol=1e-6)
    np.testing.assert_allclose(found.score, logits.logsumexp(1) / 20, atol=1e-6)
    assert found.labels.tolist() == logits.argmax(1).tolist() and found.ranked.shape == (3, 2)
    assert (found.unknown == (found.score < 0.05)).all()


def test_one_image_in_a_hundred_of_new_ones_is_unknown() -> None:
    generator = np.random.default_rng(0)
    prototypes, features = (generator.normal(size=(n, 8)).astype(np.float32) for n in (3, 20_000))
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    found = scores(features, prototypes, 30.0)
    most = (features @ prototypes.T).max(1)
    assert ((found >= most - 1e-6) & (found <= most + np.log(3) / 30 + 1e-6)).all()
    known = [unknown_below(found[start : start + 150]) for start in range(0, 15_000, 150)]
    shares = [float((found[15_000:] < below).mean()) for below in known if below is not None]
    assert len(shares) == 100 and 0.003 < np.mean(shares) < 0.012
    assert unknown_below(found[:98]) is None and unknown_below(found[:99]) == found[:99].min()
    head = Head(prototypes, np.zeros(8, np.float32), 30.0, known[0])
    assert (head.answers(features).unknown == (found < known[0])).all()
    assert replace(head, unknown_below=None).answers(features).unknown is None


def test_a_large_jpeg_is_decoded_small_and_says_the_same(exported: Path, tmp_path: Path) -> None:
    model = Predictor.load(exported)
    Image.effect_mandelbrot((1600, 1200), (-2, -1, 1, 1), 100).convert("RGB").save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        drafted = model.pixels(image)
        assert image.size == (200, 150)  # an eighth: more than 2.5 times the 32 pixels that the model reads
    with Image.open(tmp_path / "a.jpg") as image:
        assert (model.clip.preprocess(image) == drafted).all()  # as the features that it was adapted to
    with Image.open(tmp_path / "a.jpg") as image:
        image.load()  # what is decoded stays as it is
        whole = model.clip.preprocess(image)
        assert image.size == (1600, 1200)
    assert (drafted - whole).abs().mean() < 0.05
    np.testing.assert_allclose(
        *(model.answers(each[None], 2).probabilities[0, 0] for each in (drafted, whole)), atol=0.01
    )


def edit(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edited(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return edited


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def tensors(name: str, **changes: Any) -> Callable[[Path], None]:
    """Other tensors, with the digest put right: what somebody exported wrongly, not what a copy damaged."""

    def changed(folder: Path) -> None:
        path = folder / name
        found = {**load_file(path)}
        found |= {key: change(found[key]) for key, change in changes.items()}
        save_file(found, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        edit("latteflow.json", lambda said: {**said, "sha256": {**said["sha256"], name: digest}})(folder)

    return changed


def cut(folder: Path) -> None:
    path = folder / "open_clip_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "there is no such folder; `latteflow export DOMAIN"),
        (remove("latteflow.json"), "has no latteflow.json"),
        (lambda folder: (folder / "latteflow.json").write_text("{"), "latteflow.json cannot be read"),
        (edit("latteflow.json", lambda said: {**said, "version": 99}), "not a .'latteflow-model', 1."),
        (edit("latteflow.json", lambda said: {**said, "unknown_below": [1]}), "TypeError"),
        (edit("latteflow.json", lambda said: {**said, "temperature": 0.5}), "temperature in latteflow.json is 0.5"),
        (edit("latteflow.json", lambda said: {**said, "temperature": float("inf")}), "is not finite"),
        (edit("latteflow.json", lambda said: {**said, "sha256": {"../x": ""}}), "which is not in the folder"),
        (remove("classes.json"), "classes.json"),
        (edit("classes.json", lambda said: [*said, "green"]), "names 3 classes, the classifier has 2"),
        (edit("classes.json", lambda said: ["red", "red"]), "names a class twice"),
        (edit("classes.json", lambda said: {"red": 1}), "not a list of names"),
        (remove("classifier.safetensors"), "classifier.safetensors is missing; copy the whole folder"),
        (remove("open_clip_model.safetensors"), "open_clip_model.safetensors is missing"),
        (remove("open_clip_config.json"), "cannot be loaded"),
        (cut, "open_clip_model.safetensors has sha256"),
        (tensors("classifier.safetensors", prototypes=lambda t: t * float("nan")), "is not finite"),
        (tensors("classifier.safetensors", prototypes=lambda t: t[:, :5].contiguous()), "do not belong together"),
        (tensors("classifier.safetensors", prototypes=lambda t: t[:, :5].contiguous(),
                 centre=lambda t: t[:5].contiguous()), "images have 32 dimensions, the classifier 5"),
        (tensors("open_clip_model.safetensors", **{"visual.proj": lambda t: t / 0}), "visual.proj holds a number that"),
    ],
)  # fmt: skip
def test_what_is_no_sound_model(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=message):
        Predictor.load(folder)


def test_classes_may_be_renamed(folder: Path) -> None:
    edit("classes.json", lambda said: ["rot", "blau"])(folder)
    assert Predictor.load(folder).classes == ["rot", "blau"]


@pytest.mark.parametrize("name", ["latteflow.json", "classes.json", "tokenizer.json", "notes.txt"])
@pytest.mark.parametrize("kind", ["pipe", "link to nothing", "link to itself", "link to a device"])
def test_only_regular_files_are_opened(folder: Path, name: str, kind: str) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"link to nothing": "nowhere", "link to itself": name, "link to a device": "/dev/zero"}[kind])
    with pytest.raises(ModelError, match=rf"{name} is (no regular file|a link that leads to no file)"):
        Predictor.load(folder)
    with pytest.raises(ModelError, match=f"{name} is "):
        clip.identity(ClipSettings(model=str(folder)))  # the same folder as the base of a domain


def test_a_link_to_a_file_is_a_file(folder: Path, tmp_path: Path) -> None:
    """As model hubs lay out what they downloaded."""
    blob = (folder / "open_clip_model.safetensors").rename(tmp_path / "blob")
    (folder / "open_clip_model.safetensors").symlink_to(blob)
    assert Predictor.load(folder).classes == ["red", "blue"]


@pytest.mark.parametrize("name", ["latteflow.json", "classes.json", "open_clip_config.json"])
@pytest.mark.parametrize("harm", ["deep", "large", "bytes"])
def test_hostile_json_is_one_message(folder: Path, name: str, harm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latteflow.models.towers.folder.MOST_JSON", 1 << 20)
    content = {"deep": b"[" * 200_000 + b"]" * 200_000, "large": b" " * (1 << 20) + b"[]", "bytes": b"\xff\xfe{"}
    (folder / name).write_bytes(content[harm])
    with pytest.raises(ModelError, match=name if harm == "large" else str(folder)):
        Predictor.load(folder)


@pytest.mark.parametrize("name", ["classifier.safetensors", "open_clip_model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no tensors", b"\xff" * 64, b"\x10\0\0\0\0\0\0\0" + b"[" * 16])
def test_what_is_no_safetensors_is_one_message(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    edit("latteflow.json", lambda said: {**said, "sha256": {**said["sha256"], name: digest}})(folder)
    with pytest.raises(ModelError):
        Predictor.load(folder)


def test_a_folder_of_the_embedded_model_with_other_files_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    (tmp_path / "tokenizer.json").write_text("{}")
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}
    config = {"schema": "latteflow-embedded", "version": 1, "n_anchors": 3, "sha256": digests}
    (tmp_path / "latteflow_embedded.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot be loaded"):
        clip.read(ClipSettings(model=str(tmp_path)))
    (tmp_path / "latteflow_embedded.json").write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(ModelError, match="cannot be read"):
        clip.read(ClipSettings(model=str(tmp_path)))


def test_a_temperature_makes_it_less_sure_and_changes_no_answer(folder: Path) -> None:
    images = [draw(number, "red") for number in range(5)]
    before = Predictor.load(folder).predict(images)
    edit("latteflow.json", lambda said: {**said, "temperature": 4.0})(folder)
    after = Predictor.load(folder).predict(images)
    assert (after.ranked == before.ranked).all() and (after.probabilities[:, 0] < before.probabilities[:, 0]).all()
    np.testing.assert_array_equal(after.score, before.score)
    np.testing.assert_array_equal(after.unknown, before.unknown)
    edit("latteflow.json", lambda said: {name: said[name] for name in said if name != "temperature"})(folder)
    np.testing.assert_array_equal(Predictor.load(folder).predict(images).probabilities, before.probabilities)


def test_what_the_exporter_trips_over_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    import torch

    from latteflow.models.ship.to_onnx import to_onnx

    def export(*_: object, **__: object) -> None:
        try:
            raise ValueError("cannot view\nmore of it")
        except ValueError as error:
            raise RuntimeError("this is step 2/3\n- create an issue") from error

    monkeypatch.setattr(torch.onnx, "export", export)
    with pytest.raises(ModelError) as caught:
        to_onnx(Predictor.load(folder), folder)
    assert str(caught.value).endswith("as ONNX: ValueError: cannot view")


@pytest.mark.slow
def test_onnx_says_the_same_of_any_number_of_images(folder: Path) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    from latteflow.models.ship.to_onnx import noise, to_onnx

    model = Predictor.load(folder)
    assert to_onnx(model, folder) < 1e-5
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    for n in (1, 7):
        pixels = noise(model, n)
        ours = model.answers(pixels)
        features, logits = session.run(["features", "logits"], {"pixels": pixels.numpy()})
        assert features.shape == (n, 32) and logits.argmax(1).tolist() == ours.labels.tolist()
        np.testing.assert_allclose(np.log(np.exp(logits).sum(1)) / 20, ours.score, atol=1e-5)


@pytest.mark.parametrize("quick", [False, True])
def test_transformers_reads_it_with_either_activation(folder: Path, quick: bool) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    from latteflow.models.ship.to_transformers import to_transformers

    edit("open_clip_config.json", lambda s: {**s, "model_cfg": {**s["model_cfg"], "quick_gelu": quick}})(folder)
    model = Predictor.load(folder)
    assert to_transformers(model, folder) < 1e-5
    theirs = CLIPModel.from_pretrained(folder / "transformers").eval()
    assert theirs.config.vision_config.hidden_act == ("quick_gelu" if quick else "gelu")
    tokens = CLIPTokenizer.from_pretrained(folder / "transformers")(
        ["a red circle", "two"], padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        features = theirs.get_text_features(**tokens).pooler_output
    ours = model.clip.text_features(["a red circle", "two"])
    np.testing.assert_allclose(torch.nn.functional.normalize(features).numpy(), ours, atol=1e-5)


def test_what_transformers_has_no_place_for_is_refused(folder: Path) -> None:
    from latteflow.models.ship.to_transformers import to_transformers

    model = Predictor.load(folder)
    model.clip.model.visual.ln_pre = torch.nn.Identity()
    with pytest.raises(ModelError, match=r"does not map to transformers' CLIPModel: .*pre_layrnorm"):
        to_transformers(model, folder)
    assert not (folder / "transformers").exists()
    model.clip.model.__class__ = type("CustomTextCLIP", (type(model.clip.model),), {})
    with pytest.raises(ModelError, match="CustomTextCLIP does not map"):
        to_transformers(model, folder)
