"""What maps to transformers' CLIPModel is known from the configuration, before any work and without torch."""

import subprocess
import sys

import pytest

from models.errors import ModelError
from models.settings import ClipSettings
from models.ship.to_transformers import check


@pytest.mark.parametrize(
    ("model", "has"),
    [
        ("RN50", "a ResNet"),
        ("convnext_base", "the image tower convnext_base of timm"),
        ("coca_ViT-B-32", "CoCa's towers"),
        ("ViT-B-16-SigLIP", "the image tower vit_base_patch16_siglip_224 of timm"),
        ("xlm-roberta-base-ViT-B-32", "a text tower that is not CLIP's own"),
        ("embedded", "the embedded model's towers"),
    ],
)
def test_what_does_not_map_is_named_with_what_does(model: str, has: str) -> None:
    with pytest.raises(ModelError, match=f"{model}' has {has}, .* such as ViT-B-32"):
        check(ClipSettings(model=model))


def test_clip_s_own_vits_map() -> None:
    for model in ("ViT-B-32", "ViT-H-14-quickgelu", "hf-hub:someone/model"):
        check(ClipSettings(model=model))


def test_it_is_known_without_torch() -> None:
    program = "import sys; from models.ship.to_transformers import check; from models.settings import ClipSettings; "
    program += "check(ClipSettings(model='ViT-B-32')); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"
