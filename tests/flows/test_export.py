"""The exported folder is a model of its own: open_clip alone, in a fresh Python, gives our logits."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import call
from latteflow.flows.pipeline import run_plainly
from latteflow.models.methods.latteclip import LatteClipSettings
from latteflow.storage.tables import read_parquet
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import open_store
from latteflow.tasks.ship.export import export_tuned

PLAIN_OPEN_CLIP = """
import json, sys
import open_clip, torch
from PIL import Image
from safetensors.torch import load_file

folder, out, *paths = sys.argv[1:]
assert "models" not in sys.modules and "tasks" not in sys.modules
model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
model.eval()
head = load_file(f"{folder}/classifier.safetensors")

def square(image):  # the domain says `resize: pad`
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas

with torch.inference_mode():
    pixels = torch.stack([preprocess(square(Image.open(path).convert("RGB"))) for path in paths])
    features = torch.nn.functional.normalize(model.encode_image(pixels) - head["centre"], dim=-1)
    probabilities = (head["scale"] * features @ head["prototypes"].T).softmax(-1)
json.dump(probabilities.tolist(), open(out, "w"))
"""


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("train", ["prototypes", "projections", "last_blocks", "all"])
@pytest.mark.parametrize("centre", [False, True])
def test_open_clip_alone_gives_our_predictions(domain: Domain, tmp_path: Path, train: str, centre: bool) -> None:
    if centre and train != "projections":
        pytest.skip("one way of training is enough to see that the centre is exported")
    tune = {"train": train, "epochs": 2, "batch_size": 8, "lr": 1e-3, "n_blocks": 1}
    domain = domain.model_copy(
        update={
            "latteclip": LatteClipSettings.model_validate(tune),
            "clip": domain.clip.model_copy(update={"centre": centre}),
            "seeds": [0],
        }
    )
    results = {result.label: result for result in run_plainly(domain)}
    folder = tmp_path / "exported"
    export_tuned(domain, results["tune"], 0, folder)
    assert json.loads((folder / "classes.json").read_text()) == domain.classes

    told = read_parquet(open_store(domain).open(results["evaluate"].ref).read("predictions.parquet"))
    paths = [str(tmp_path / "test" / path) for path in told["path"]]
    out = tmp_path / "probabilities.json"
    command = [sys.executable, "-c", PLAIN_OPEN_CLIP, str(folder), str(out), *paths]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=120)
    theirs = np.array(json.loads(out.read_text()))
    assert theirs.argmax(1).tolist() == told["latteclip"].to_list()
    np.testing.assert_allclose(theirs.max(1), told["latteclip_probability"], atol=1e-4)


def test_training_towers_changes_them_and_nothing_frozen(domain: Domain) -> None:
    from latteflow.tasks.tune.models import read_tuned

    settings = LatteClipSettings(train="last_blocks", n_blocks=1, epochs=2, batch_size=8, lr=1e-3)
    domain = domain.model_copy(update={"latteclip": settings, "seeds": [0]})
    results = {result.label: result for result in run_plainly(domain)}
    towers = read_tuned(open_store(domain).open(results["tune"].ref), "latteclip", 0).towers
    assert any(name.startswith("visual.transformer.resblocks.1") for name in towers)
    assert not any(name.startswith("visual.transformer.resblocks.0") for name in towers)


def test_what_does_not_map_to_transformers_is_refused_before_any_stage(
    domain: Domain, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "domain.yaml"
    file.write_text(re.sub(r"(?m)^clip: .*", "clip: {model: RN50, pretrained: openai}", file.read_text()))
    assert call("export", file, tmp_path / "model", "--transformers") == 1
    assert "has a ResNet, which transformers' CLIPModel has not" in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "store").exists() and not (tmp_path / "model").exists()
