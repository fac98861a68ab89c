"""A second tower: that its features are timm's own, what tells it from others, and what is said of bad names."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from conftest import draw
from latteflow.models.errors import ModelError
from latteflow.models.settings import ClipSettings, NeighbourSettings
from latteflow.models.towers import clip, neighbours

NAME = "test_resnet"
"""A model of timm of half a million weights."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "own.safetensors"
    save_file(timm.create_model(NAME, pretrained=False).state_dict(), path)
    return path


def test_features_are_those_of_timm(weights: Path) -> None:
    tower = neighbours.read(NeighbourSettings(model=f"timm/{NAME}", pretrained=str(weights)))
    theirs = timm.create_model(NAME, pretrained=False, checkpoint_path=str(weights)).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
    pictures = [draw(number, "red") for number in range(3)]
    with torch.inference_mode():
        expected = theirs.forward_head(
            theirs.forward_features(torch.stack([transform(each) for each in pictures])), pre_logits=True
        )
    found = tower.image_embeds(torch.stack([tower.preprocess(each) for each in pictures]))
    assert found.shape == (3, tower.dim)
    assert found.allclose(expected, atol=1e-5)
    assert found.std(0).max() > 1e-4  # and not the same of every picture


def test_what_is_padded_is_seen_to_its_rim(weights: Path) -> None:
    wide = Image.new("RGB", (400, 100), "white")
    wide.paste((0, 0, 0), (0, 0, 40, 100))
    tower = neighbours.read(NeighbourSettings(model=f"timm/{NAME}", pretrained=str(weights), resize="pad"))
    seen = tower.preprocess(wide)
    middle = seen[0, seen.shape[1] // 2]
    assert float((middle < 0).float().mean()) == pytest.approx(40 / 400, abs=0.01)


def test_a_folder_of_open_clip_is_a_tower_too(tiny_clip: Path) -> None:
    pixels = torch.rand(2, 3, 32, 32)
    found = neighbours.read(NeighbourSettings(model=str(tiny_clip))).image_embeds(pixels)
    assert found.equal(clip.read(ClipSettings(model=str(tiny_clip))).image_embeds(pixels))


def test_identity_is_of_the_weights_and_not_of_their_place(weights: Path, tmp_path: Path) -> None:
    def of(path: Path, model: str = f"timm/{NAME}") -> object:
        return neighbours.identity(NeighbourSettings(model=model, pretrained=str(path)))

    (tmp_path / "moved.safetensors").write_bytes(weights.read_bytes())
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert of(weights) == of(tmp_path / "moved.safetensors") != of(tmp_path / "other.safetensors")
    assert of(weights) != of(weights, "timm/test_vit")


@pytest.mark.parametrize(
    ("model", "pretrained", "said"),
    [
        ("timm/vit_small_patch14_dinov2.lvd142", None, "did you mean timm/vit_small_patch14_dinov2.lvd142m"),
        ("timm/test_resnett", "own.safetensors", "did you mean timm/test_resnet"),
        ("timm/test_resnet", "weights.pth", "'weights.pth' is no .safetensors file"),
        ("timm/test_resnet", "missing.safetensors", "is no .safetensors file that is there"),
        ("ViT-B-33", "openai", "neighbours: clip.model 'ViT-B-33'"),
    ],
)
def test_bad_names(weights: Path, monkeypatch: pytest.MonkeyPatch, model: str, pretrained: str, said: str) -> None:
    monkeypatch.chdir(weights.parent)
    with pytest.raises(ModelError, match=said):
        neighbours.check(NeighbourSettings(model=model, pretrained=pretrained))


def test_weights_of_another_model(weights: Path) -> None:
    with pytest.raises(
        ModelError, match=r"'timm/test_vit' with pretrained .* cannot be loaded \(RuntimeError: .*missing|Missing"
    ):
        neighbours.read(NeighbourSettings(model="timm/test_vit", pretrained=str(weights)))
