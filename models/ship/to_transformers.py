"""An exported model as a folder that Hugging Face transformers loads as `CLIPModel`, weights renamed.

The mapping must use every tensor of the one and fill every tensor of the other, and the result is compared in numbers.
An architecture that merely looks like a CLIP is refused: by its configuration before any work, else by its features.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latteflow.models.errors import ModelError
from latteflow.models.settings import ClipSettings
from latteflow.models.towers import clip
from latteflow.models.towers.folder import TRANSFORMERS

if TYPE_CHECKING:
    from torch import Tensor

    from latteflow.models.ship.predictor import Predictor

MOST_DIFFERENCE = 1e-4
"""Between unit features of open_clip and of transformers, float32 on the processor; more is an error."""
_RESAMPLES = {"bilinear": 2, "bicubic": 3}
_TEXTS = ["a photo of a cat", "Two dogs' toys, in the snow (1999)!", "naïve café 北京"]
_BLOCKS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_NAMES = {
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
# What CLIPModel has at any value, and what it has only as open_clip's default.
_FREE = {
    "vision_cfg": {
        "image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size", "patch_dropout", "output_tokens",
        "attn_pooler_queries", "attn_pooler_heads",
    },
    "text_cfg": {
        "context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "output_tokens", "pad_id", "eos_id",
        "hf_model_pretrained", "hf_proj_type", "hf_pooler_type",
    },
}  # fmt: skip
_DEFAULTS = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "proj_type": ("linear",)}
_TOWERS = {"visual.transformer.resblocks.": "vision_model", "transformer.resblocks.": "text_model"}


def check(settings: ClipSettings) -> None:
    """Whether a model may map to transformers' `CLIPModel`; by its configuration, before any work.

    Raises:
        ModelError: it has a tower that does not, and which do.
    """
    config = clip.shape(settings)
    if config is None:
        if settings.model.startswith("hf-hub:"):
            return  # seen when it is there
        has = "the embedded model's towers"
    elif isinstance(config["vision_cfg"].get("layers"), list):
        has = "a ResNet"
    elif trunk := config["vision_cfg"].get("timm_model_name"):
        has = f"the image tower {trunk} of timm"
    elif "multimodal_cfg" in config:
        has = "CoCa's towers"
    elif config.get("custom_text") or config["text_cfg"].get("hf_model_name"):
        has = "a text tower that is not CLIP's own"
    elif (said := _other_than_clip(config)) is None:
        return
    else:
        has = said
    raise ModelError(
        f"clip.model {settings.model!r} has {has}, which transformers' CLIPModel has not; a ViT with CLIP's own text "
        "tower maps, such as ViT-B-32. Export without --transformers: the folder is for open_clip or latteflow"
    )


def _other_than_clip(config: Mapping[str, Any]) -> str | None:
    """The first setting of a ViT with a text tower of open_clip's that CLIP's own towers have not."""
    size = config["vision_cfg"].get("image_size", 224)
    if isinstance(size, Sequence) and len({*size}) > 1:
        return f"images of {size[0]} x {size[1]} pixels"
    for tower, free in _FREE.items():
        for name, value in config[tower].items():
            if name not in free and not name.startswith("timm_") and value and value not in _DEFAULTS.get(name, ()):
                return f"`{name}: {value}` in its {tower}"
    for name in ("init_logit_bias", "nonscalar_logit_scale"):
        if config.get(name):
            return f"`{name}: {config[name]}`"
    return None


def to_transformers(predictor: Predictor, folder: Path) -> float:
    """Write ``transformers/``: weights, configuration, tokenizer and image processor.

    The classifier stays what it is: ``classifier.safetensors`` of the exported folder.

    Returns:
        The largest difference between both libraries' unit features, of noise as images and of some texts.

    Raises:
        ModelError: the model is not of CLIP's own architecture, or the features are not the same.
    """
    from open_clip import CLIP
    from transformers import CLIPConfig, CLIPModel

    own = predictor.clip.model
    if type(own) is not CLIP:
        raise ModelError(
            f"{type(own).__name__} does not map to transformers' CLIPModel; only a ViT with CLIP's own text tower does"
        )
    folder = folder / TRANSFORMERS
    tokenizer, processor = _tokenizer(predictor), _processor(own)
    model = CLIPModel(CLIPConfig(**_config(own))).eval()
    state = dict(_renamed(own.state_dict()))
    wanted = {name for name in model.state_dict() if not name.endswith("position_ids")}
    if state.keys() != wanted or any(state[name].shape != tensor.shape for name, tensor in model.state_dict().items()):
        odd = sorted(state.keys() ^ wanted) or ["shapes"]
        raise ModelError(f"this open_clip model does not map to transformers' CLIPModel: {', '.join(odd[:4])}")
    model.load_state_dict(state)
    difference = _difference(predictor, model, tokenizer)
    if not difference <= MOST_DIFFERENCE:
        raise ModelError(
            f"as transformers' CLIPModel this model has other features (by {difference:.2g}): it is not written"
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n", encoding="utf-8")
    return difference


def _config(own: Any) -> dict[str, Any]:
    """Of `CLIPConfig`, from the modules as they are."""
    from torch import nn

    visual, text = own.visual, own.transformer

    def tower(blocks: Any) -> dict[str, Any]:
        block = blocks.resblocks[0]
        activation = "gelu" if isinstance(block.mlp.gelu, nn.GELU) else "quick_gelu"
        return {
            "hidden_size": blocks.width,
            "intermediate_size": block.mlp.c_fc.out_features,
            "num_hidden_layers": len(blocks.resblocks),
            "num_attention_heads": block.attn.num_heads,
            "hidden_act": activation,
            "layer_norm_eps": block.ln_1.eps,
        }

    try:
        dim = own.text_projection.shape[1]
        return {
            "projection_dim": dim,
            "vision_config": {
                **tower(visual.transformer),
                "projection_dim": dim,
                "image_size": visual.image_size[0],
                "patch_size": visual.patch_size[0],
            },
            "text_config": {
                **tower(text),
                "projection_dim": dim,
                "vocab_size": own.vocab_size,
                "max_position_embeddings": own.context_length,
                "bos_token_id": own.vocab_size - 2,
                "eos_token_id": own.vocab_size - 1,
                "pad_token_id": own.vocab_size - 1,
            },
        }
    except AttributeError as error:
        raise ModelError(f"this open_clip model does not map to transformers' CLIPModel ({error})") from error


def _renamed(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors by transformers' names; one that has none there keeps its own."""
    for name, tensor in state.items():
        tensor = tensor.detach().float().cpu()
        tower = next((each for each in _TOWERS if name.startswith(each)), None)
        if name in _PROJECTIONS:
            yield _PROJECTIONS[name], tensor.T.contiguous()
        elif tower is None:
            yield _NAMES.get(name, name), tensor.clone()
        else:
            number, _, rest = name.removeprefix(tower).partition(".")
            place = f"{_TOWERS[tower]}.encoder.layers.{number}"
            part, _, kind = rest.rpartition(".")
            if rest.startswith("attn.in_proj_"):
                for each, rows in zip("qkv", tensor.chunk(3), strict=True):
                    yield f"{place}.self_attn.{each}_proj.{rest.removeprefix('attn.in_proj_')}", rows.clone()
            else:
                yield f"{place}.{_BLOCKS.get(part, part)}.{kind}", tensor.clone()


def _tokenizer(predictor: Predictor) -> Any:
    """transformers' CLIPTokenizer with open_clip's vocabulary."""
    from open_clip import SimpleTokenizer
    from transformers import CLIPTokenizer

    own: Any = predictor.clip.tokenizer
    if not isinstance(own, SimpleTokenizer):
        raise ModelError(
            f"{type(own).__name__} does not map to transformers' CLIPTokenizer, so the model is not written"
        )
    start, end = (own.decoder[number] for number in own.all_special_ids[:2])
    names = {start: "<|startoftext|>", end: "<|endoftext|>"}
    return CLIPTokenizer(
        vocab={names.get(token, token): number for token, number in own.encoder.items()},
        merges=list(own.bpe_ranks),
        model_max_length=own.context_length,
    )


def _processor(own: Any) -> dict[str, Any]:
    """Of `CLIPImageProcessor`.

    Raises:
        ModelError: it cannot prepare pictures as this model's are.
    """
    settings = own.visual.preprocess_cfg
    size = settings["size"] if isinstance(settings["size"], int) else settings["size"][0]
    square, mode, resample = {"height": size, "width": size}, settings["resize_mode"], settings["interpolation"]
    if mode not in ("shortest", "squash") or resample not in _RESAMPLES:
        raise ModelError(
            f"pictures of this model are prepared by `resize_mode: {mode}` and `interpolation: {resample}`, which "
            "transformers' CLIPImageProcessor has not; export without --transformers"
        )
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": square if mode == "squash" else {"shortest_edge": size},
        "crop_size": square,
        "resample": _RESAMPLES[resample],
        "image_mean": list(settings["mean"]),
        "image_std": list(settings["std"]),
        "do_resize": True,
        "do_center_crop": mode == "shortest",
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
    }


def _difference(predictor: Predictor, model: Any, tokenizer: Any) -> float:
    import torch
    from torch.nn import functional as F

    from latteflow.models.ship.to_onnx import noise

    predictor.clip.model.cpu()
    pixels = noise(predictor, 3)
    texts = tokenizer(_TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    with torch.inference_mode():
        theirs = (
            model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output),
            model.text_projection(model.text_model(**texts).pooler_output),
        )
    ours = predictor.clip.image_embeds(pixels), torch.from_numpy(predictor.clip.text_features(_TEXTS))
    pairs = zip(ours, theirs, strict=True)
    return max(float((F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).abs().max()) for a, b in pairs)
