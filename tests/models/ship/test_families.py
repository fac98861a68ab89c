"""open_clip's architectures: where towers end and keep their blocks, and that a folder stands by itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from timm.models import register_model
from transformers import RobertaConfig

from latteflow.models.errors import ModelError
from latteflow.models.settings import ClipSettings
from latteflow.models.ship.export import export
from latteflow.models.towers import clip
from latteflow.models.towers.blocks import IMAGE_TAILS, TEXT_TAILS, last_blocks

DIM = 64
NATIVE = {"layers": 1, "width": DIM, "head_width": 32, "image_size": 32, "patch_size": 16}
TIMM = {"timm_model_name": "test_vit", "image_size": 160}
TEXT = {"layers": 1, "width": DIM, "heads": 2}
SIGLIP = {"timm_model_name": "tiny_siglip", "image_size": 256}
PICTURE = Image.new("RGB", (40, 30))
BERT = {"hidden_size": DIM, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@register_model
def tiny_siglip(**options: Any) -> Any:
    """SigLIP's image tower with little in it."""
    return timm.create_model("vit_base_patch32_siglip_256", embed_dim=DIM, depth=1, num_heads=2, **options)


def write(folder: Path, vision: dict[str, Any], text: dict[str, Any]) -> clip.Clip:
    """A small model with random weights as a folder, read as the product reads it."""
    folder.mkdir()
    if "hf_proj_type" in text:
        RobertaConfig(**BERT, vocab_size=49408).save_pretrained(folder / "tower")
        text = {**text, "hf_model_name": str(folder / "tower"), "hf_model_pretrained": False}
    config = {"embed_dim": DIM, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(**config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    save_file({name: t.contiguous().clone() for name, t in model.state_dict().items()}, folder / "model.safetensors")
    said = {"model_cfg": {**config, "custom_text": True}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(said))
    return clip.read(ClipSettings(model=str(folder)))


def shipped(base: clip.Clip, folder: Path, **maps: torch.Tensor) -> None:
    """An export with these maps."""
    export(
        base, folder, classes=["a", "b"], prototypes=F.normalize(torch.randn(2, DIM)), centre=torch.zeros(DIM),
        scale=10.0, resize="crop", unknown_below=None, **maps,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("vision", "text"),
    [
        ({**SIGLIP, "timm_pool": "map", "timm_proj": "none"}, {**TEXT, "proj_type": "none"}),
        ({**TIMM, "timm_pool": "token", "timm_proj": None}, {**TEXT, "proj_bias": True}),  # as EVA; as SigLIP
        ({**TIMM, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "mlp"}, TEXT),
        ({**TIMM, "timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": None}, TEXT),  # as MobileCLIP
        ({**NATIVE, "layers": [1, 1, 1, 1], "width": 8}, {"hf_proj_type": "mlp"}),
        (NATIVE, {"hf_proj_type": None}),
    ],
)
def test_maps_go_into_every_kind_of_tower_and_open_clip_reads_them(
    tmp_path: Path, vision: dict[str, Any], text: dict[str, Any]
) -> None:
    base = write(tmp_path / "base", vision, text)
    image_map, text_map = (torch.eye(DIM) + 0.1 * torch.randn(DIM, DIM) for _ in range(2))
    shipped(base, tmp_path / "out", image_map=image_map, text_map=text_map)
    pixels, words = torch.randn(2, 3, *base.preprocess(PICTURE).shape[1:]), ["a photo of a robin", "b"]
    wanted = F.normalize(base.image_embeds(pixels) @ image_map, dim=-1)
    with torch.inference_mode():
        embeds = base.model.encode_text(base.tokenizer(words)) @ text_map
    own, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    own.eval()
    with torch.inference_mode():
        torch.testing.assert_close(own.encode_image(pixels, normalize=True), wanted, atol=1e-5, rtol=0)
        told = own.encode_text(base.tokenizer(words), normalize=True)
    torch.testing.assert_close(told, F.normalize(embeds, dim=-1), atol=1e-5, rtol=0)

    shutil.rmtree(tmp_path / "base")  # with the configuration of the text tower, where transformers builds it
    again = clip.read(ClipSettings(model=str(tmp_path / "out")))
    torch.testing.assert_close(torch.from_numpy(again.text_features(words)), told, atol=1e-5, rtol=0)


def test_a_tower_that_would_be_another_with_a_matrix_at_its_end_is_refused(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {**TIMM, "timm_pool": "avg", "timm_proj": "none"}, TEXT)
    with pytest.raises(ModelError, match=r"with one it is another \(visual.trunk.fc_norm.bias, .*`train: prototypes`"):
        shipped(base, tmp_path / "out", image_map=torch.eye(DIM))


@pytest.mark.parametrize(
    ("name", "last", "earlier"),
    [
        ("ViT-B-32", "visual.transformer.resblocks.11.mlp.c_fc.weight", "visual.ln_pre.weight"),
        ("coca_ViT-B-32", "visual.attn_pool.query", "visual.ln_pre.weight"),
        ("RN50", "visual.layer4.2.conv1.weight", "visual.layer3.0.conv1.weight"),
        ("ViT-B-16-SigLIP", "visual.trunk.attn_pool.latent", "visual.trunk.pos_embed"),
        ("PE-Core-T-16-384", "visual.trunk.attn_pool.latent", "visual.trunk.norm_pre.weight"),
        ("EVA02-B-16", "visual.trunk.head.weight", "visual.trunk.pos_embed"),
        ("MobileCLIP-S1", "visual.trunk.head.fc.weight", "visual.trunk.stem.0.conv_kxk.0.conv.weight"),
        ("convnext_base", "visual.trunk.head.norm.weight", "visual.trunk.stages.2.blocks.0.norm.weight"),
        ("swin_base_patch4_window7_224", "visual.trunk.norm.weight", "visual.trunk.layers.2.blocks.0.norm1.weight"),
        ("ViTamin-S", "visual.trunk.fc_norm.weight", "visual.trunk.blocks.0.norm1.weight"),
    ],
)
def test_the_last_blocks_are_found_with_what_follows_them(name: str, last: str, earlier: str) -> None:
    with torch.device("meta"):
        model = open_clip.create_model(name, load_weights=False, device="meta")
    names = {each for each, _ in model.named_parameters()}
    image, text = last_blocks(model, IMAGE_TAILS, 1), last_blocks(model, TEXT_TAILS, 1)
    assert {last, earlier} <= names
    assert last in image and earlier not in image and not {each for each in image if not each.startswith("visual.")}
    assert any(each.endswith("text_projection") or "text_projection." in each for each in text) and len(text) > 5


def test_weights_of_another_activation_are_refused() -> None:
    """open_clip would load them with a warning."""
    with pytest.raises(ModelError, match=r"'openai' was trained with quick GELU.* take clip.model ViT-B-32-quickgelu$"):
        clip.check(ClipSettings(model="ViT-B-32", pretrained="openai"))
    clip.check(ClipSettings(model="ViT-B-32-quickgelu", pretrained="openai"))
    clip.check(ClipSettings(model="ViT-B-32", pretrained="laion2b_s34b_b79k"))


def test_a_vocabulary_is_part_of_the_model(tiny_clip: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_clip, tmp_path / "model")
    settings = ClipSettings(model=str(tmp_path / "model"))
    found = [clip.identity(settings)]
    for text in ("a b\n", "a c\n"):
        (tmp_path / "model" / "merges.txt").write_text(text)
        found.append(clip.identity(settings))
    assert found[0] == clip.identity(ClipSettings(model=str(tiny_clip))) and found[1] != found[2] != found[0]
