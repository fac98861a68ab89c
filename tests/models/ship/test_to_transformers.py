"""What maps to transformers' CLIPModel is known from the configuration, before any work and without torch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from latteflow.models.errors import ModelError
from latteflow.models.settings import ClipSettings
from latteflow.models.ship.predictor import Predictor
from latteflow.models.ship.to_transformers import check, to_transformers


@pytest.mark.parametrize(
    ("model", "has"),
    [
        ("RN50", "a ResNet"),
        ("convnext_base", "the image tower convnext_base of timm"),
        ("coca_ViT-B-32", "CoCa's towers"),
        ("ViT-B-16-SigLIP", "the image tower vit_base_patch16_siglip_224 of timm"),
        ("xlm-roberta-base-ViT-B-32", "a text tower that is not CLIP's own"),
        ("embedded", "the embedded model's towers"),
        ("ViT-H-14-CLIPA", "`no_ln_pre: True` in its vision_cfg"),
        ("ViT-M-16-alt", "`ls_init_value: 0.0001` in its vision_cfg"),
        ("ViT-H-14-worldwide", "`hf_tokenizer_name: facebook/xlm-v-base` in its text_cfg"),
    ],
)
def test_what_does_not_map_is_named_with_what_does(model: str, has: str) -> None:
    with pytest.raises(ModelError, match=f"{model}' has {has}, .* such as ViT-B-32"):
        check(ClipSettings(model=model))


def test_clip_s_own_vits_map() -> None:
    for model in ("ViT-B-32", "ViT-H-14-quickgelu", "hf-hub:someone/model"):
        check(ClipSettings(model=model))


def prepared_by(exported: Path, folder: Path, mode: str) -> Predictor:
    """The exported model with pictures prepared in another way."""
    shutil.copytree(exported, folder)
    file = folder / "open_clip_config.json"
    said = json.loads(file.read_text())
    said["preprocess_cfg"]["resize_mode"] = mode
    file.write_text(json.dumps(said))
    settings = json.loads((folder / "latteflow.json").read_text())
    (folder / "latteflow.json").write_text(json.dumps({**settings, "resize": "crop"}))
    return Predictor.load(folder)


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_pictures_are_prepared_as_the_model_s_own_are(exported: Path, tmp_path: Path, mode: str) -> None:
    from transformers import CLIPImageProcessorPil

    predictor = prepared_by(exported, tmp_path / "model", mode)
    assert to_transformers(predictor, tmp_path / "model") < 1e-5
    picture = Image.radial_gradient("L").resize((90, 64)).rotate(20).convert("RGB")
    prepare = CLIPImageProcessorPil.from_pretrained(tmp_path / "model" / "transformers")
    theirs = prepare(picture, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(theirs, predictor.clip.preprocess(picture), atol=1e-5, rtol=0)


def test_pictures_that_its_processor_cannot_prepare_are_refused(exported: Path, tmp_path: Path) -> None:
    predictor = prepared_by(exported, tmp_path / "model", "longest")
    with pytest.raises(ModelError, match="`resize_mode: longest`"):
        to_transformers(predictor, tmp_path / "model")
    assert not (tmp_path / "model" / "transformers").exists()


def test_it_is_known_without_torch() -> None:
    program = "import sys; from latteflow.models.ship.to_transformers import check; "
    program += "from latteflow.models.settings import ClipSettings; "
    program += "check(ClipSettings(model='ViT-B-32')); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"
