"""An exported folder as a predictor: what it says, what it refuses, and the same model in other formats."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import draw
from models import clip
from models.errors import ModelError
from models.export import export
from models.predictor import Head, Predictor, unknown_below
from models.settings import ClipSettings


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


def test_one_image_in_a_hundred_of_the_training_images_is_unknown() -> None:
    generator = np.random.default_rng(0)
    prototypes, features = (generator.normal(size=(n, 8)).astype(np.float32) for n in (3, 1000))
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    below = unknown_below(features, prototypes, 30.0)
    found = Head(prototypes, np.zeros(8, np.float32), 30.0, below).answers(features)
    assert found.unknown.sum() == 10
    most = (features @ prototypes.T).max(1)
    assert ((found.score >= most - 1e-6) & (found.score <= most + np.log(3) / 30 + 1e-6)).all()


def test_a_large_jpeg_is_decoded_small_and_says_the_same(exported: Path, tmp_path: Path) -> None:
    model = Predictor.load(exported)
    Image.effect_mandelbrot((1600, 1200), (-2, -1, 1, 1), 100).convert("RGB").save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        drafted = model.pixels(image)
        assert image.size == (200, 150)  # an eighth: more than twice the 32 pixels that the model reads
    with Image.open(tmp_path / "a.jpg") as image:
        whole = model.clip.preprocess(image)
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
        (edit("latteflow.json", lambda said: {**said, "unknown_below": None}), "TypeError"),
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


def test_a_folder_is_replaced_whole(folder: Path, tiny_clip: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    for name in ("model.onnx", "clamp.safetensors", "README.md", "latteflow_embedded.json"):
        (folder / name).write_text("old")
    (folder / "transformers").mkdir()
    model = clip.read(ClipSettings(model=str(tiny_clip)))
    export(
        model, folder, classes=["a", "b", "c"], prototypes=torch.eye(3, model.dim), centre=torch.zeros(model.dim),
        scale=10.0, resize="crop", unknown_below=0.0,
    )  # fmt: skip
    assert {path.name for path in folder.iterdir()} == {
        "notes.txt", "classes.json", "classifier.safetensors", "latteflow.json", "open_clip_config.json",
        "open_clip_model.safetensors",
    }  # fmt: skip
    assert Predictor.load(folder).classes == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["README.md", "open_clip_config.json", None])
def test_what_no_export_wrote_is_left_alone(tiny_clip: Path, tmp_path: Path, name: str | None) -> None:
    folder = tiny_clip if name is None else tmp_path
    if name is not None:
        (folder / name).write_text("mine")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    model = clip.read(ClipSettings(model=str(tiny_clip)))
    with pytest.raises(ModelError, match=r"no export wrote|base model is read from"):
        export(
            model, folder, classes=["a", "b"], prototypes=torch.eye(2, model.dim), centre=torch.zeros(model.dim),
            scale=10.0, resize="crop", unknown_below=0.0,
        )  # fmt: skip
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.slow
def test_onnx_says_the_same_of_any_number_of_images(folder: Path) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    from models.to_onnx import noise, to_onnx

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

    from models.to_transformers import to_transformers

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
    from models.to_transformers import to_transformers

    model = Predictor.load(folder)
    model.clip.model.visual.ln_pre = torch.nn.Identity()
    with pytest.raises(ModelError, match=r"does not map to transformers' CLIPModel: .*pre_layrnorm"):
        to_transformers(model, folder)
    assert not (folder / "transformers").exists()
    model.clip.model.__class__ = type("CustomTextCLIP", (type(model.clip.model),), {})
    with pytest.raises(ModelError, match="CustomTextCLIP does not map"):
        to_transformers(model, folder)
