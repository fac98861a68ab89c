"""Export: an adapted model as a folder that open_clip (or, for the embedded model, this package) loads by itself.

Files: the model (``open_clip_config.json`` and ``open_clip_model.safetensors``, or the embedded model's own three), and
beside it the classifier, ``classifier.safetensors`` (prototypes, centre, scale) with ``classes.json``. For one image:
``scale * unit(encode_image(pixels) - centre) @ prototypes.T``. ``latteflow.json``, written last, says how pictures are
resized, what logits are divided by for calibrated probabilities, from which score on an image is *unknown*, and which
bytes the other files have.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn

from latteflow.models.digests import digest_of_file
from latteflow.models.errors import ModelError
from latteflow.models.towers.clip import Clip
from latteflow.models.towers.embedded import EmbeddedClip
from latteflow.models.towers.embedded import save as save_embedded
from latteflow.models.towers.folder import (
    CLASSES_FILE,
    HEAD_FILE,
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    SCHEMA,
    SCHEMA_VERSION,
    SETTINGS_FILE,
    TEXT_CONFIG,
    write_json,
)

# Where towers keep the matrix that ends them, as open_clip names them.
_ENDS = {
    "image": (
        "image_projection", "visual.proj", "visual.head.proj", "visual.head.mlp.fc2", "visual.trunk.head",
        "visual.trunk.head.fc", "visual.attnpool.c_proj",
    ),
    "text": ("text_projection", "text.text_projection", "text.proj", "text.proj.2"),
}  # fmt: skip


def export(
    clip: Clip,
    folder: Path,
    *,
    classes: Sequence[str],
    prototypes: Tensor,
    centre: Tensor,
    scale: float,
    resize: Literal["crop", "pad"],
    unknown_below: float | None,
    temperature: float = 1.0,
    grey_range: Literal["auto", "full"] | tuple[float, float] = "auto",
    image_map: Tensor | None = None,
    text_map: Tensor | None = None,
) -> None:
    """Write the adapted model.

    Args:
        clip: the model with its trained towers in place; it is not changed.
        folder: an empty one, or created; what is to appear whole is written elsewhere first.
        classes: names, in the order of the prototypes.
        prototypes: unit rows ``(classes, dim)``.
        centre: subtracted from image embeddings before the map, ``(dim,)``.
        resize: how pictures become squares, see :class:`models.settings.ClipSettings`.
        unknown_below, temperature: see :class:`models.ship.predictor.Head`.
        grey_range: see :data:`models.settings.GreyRange`.
        image_map, text_map: ``(dim, dim)``, multiplied into the towers' projections.

    Raises:
        ModelError: there is a map, and the tower ends without a projection it could be multiplied into.
    """
    model = copy.deepcopy(clip.model).cpu()  # as maps are, wherever the model is
    changes: dict[str, dict[str, Any]] = {}
    if image_map is not None:
        changes["vision_cfg"] = fold(model, "image", image_map)
        centre = centre @ image_map
    if text_map is not None:
        changes["text_cfg"] = fold(model, "text", text_map)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        model.logit_scale.fill_(torch.tensor(scale).log())  # type: ignore[operator]
    if isinstance(model, EmbeddedClip):
        save_embedded(model, folder)
    else:
        _save_open_clip(clip, model, folder, changes)
    head = {"prototypes": prototypes, "centre": centre, "scale": torch.tensor([scale])}
    # Not save_file, whose files nobody but their owner can read.
    (folder / HEAD_FILE).write_bytes(save({name: tensor.contiguous() for name, tensor in head.items()}))
    write_json(folder / CLASSES_FILE, list(classes))
    weights = [path for path in sorted(folder.iterdir()) if path.suffix == ".safetensors"]
    settings = {
        "schema": SCHEMA,
        "version": SCHEMA_VERSION,
        "resize": resize,
        "unknown_below": unknown_below,
        "temperature": temperature,
        **({} if grey_range == "auto" else {"grey_range": grey_range}),
        "sha256": {path.name: digest_of_file(path) for path in weights},
    }
    write_json(folder / SETTINGS_FILE, settings)


def fold(model: nn.Module, side: Literal["image", "text"], change: Tensor) -> dict[str, Any]:
    """Multiply a map on the right of a tower's embeddings into the matrix that ends the tower.

    A tower of open_clip's that ends without a matrix, as SigLIP's image tower does, gets the map as one.

    Returns:
        What open_clip's configuration of the tower must say for that.

    Raises:
        ModelError: it is not known how the tower ends.
    """
    with torch.no_grad():
        for place in _ENDS[side]:
            end = _at(model, place)
            if isinstance(end, nn.Linear):
                end.weight.copy_(change.T @ end.weight)
                if end.bias is not None:
                    end.bias.copy_(end.bias @ change)
                return {}
            if isinstance(end, nn.Parameter):
                end.copy_(end @ change)
                return {}
    return _end_with(model, side, change)


def _at(model: nn.Module, place: str) -> Any:
    found: Any = model
    for name in place.split("."):
        found = getattr(found, name, None)
    return found


def _end_with(model: nn.Module, side: Literal["image", "text"], change: Tensor) -> dict[str, Any]:
    """Put a map behind a tower that ends without a matrix, where open_clip has one by its configuration."""
    matrix = nn.Linear(len(change), len(change), bias=False, device=change.device)
    matrix.weight = nn.Parameter(change.T.contiguous(), requires_grad=False)
    if side == "image" and isinstance(head := _at(model, "visual.head"), nn.Sequential):  # of timm
        head.add_module("proj", matrix)
        return {"timm_proj": "linear", "timm_proj_bias": False}
    text: Any = getattr(model, "text", model)
    if side == "text" and isinstance(getattr(text, "proj", None), nn.Identity):  # of transformers
        text.proj = matrix
        return {"hf_proj_type": "linear"}
    if side == "text" and getattr(text, "text_projection", matrix) is None:
        text.text_projection = nn.Parameter(change, requires_grad=False)
        return {"proj_type": "linear", "proj_bias": False}
    raise ModelError(
        f"{type(model).__name__} has none of {', '.join(_ENDS[side])}, so the tuned projections cannot be folded into "
        "it; tune with `train: prototypes` or `train: last_blocks`"
    )


def _save_open_clip(clip: Clip, model: nn.Module, folder: Path, changes: Mapping[str, Mapping[str, Any]]) -> None:
    import open_clip

    name = clip.name if not Path(clip.name).is_dir() else f"local-dir:{clip.name}"
    own: Any = open_clip.get_model_config(name)
    for tower, changed in changes.items():
        own[tower] |= changed
    if any(changes.values()):
        _check_form(own, model)
    config = {"model_cfg": own, "preprocess_cfg": dict(model.visual.preprocess_cfg)}  # type: ignore[union-attr,arg-type]
    state = {key: tensor.contiguous().clone() for key, tensor in model.state_dict().items()}
    (folder / OPEN_CLIP_WEIGHTS).write_bytes(save(state))
    write_json(folder / OPEN_CLIP_CONFIG, config)
    if hasattr(clip.tokenizer, "save_pretrained"):  # of Hugging Face; open_clip looks for it in the folder
        clip.tokenizer.save_pretrained(str(folder))
    if "hf_model_name" in own["text_cfg"]:
        (folder / TEXT_CONFIG).write_text(_at(model, "text.config").to_json_string(), encoding="utf-8")


def _check_form(config: Mapping[str, Any], model: nn.Module) -> None:
    """Whether open_clip makes this very model of a configuration that has another end."""
    options = {name: value for name, value in config.items() if name != "custom_text"}
    with torch.device("meta"):
        made = type(model)(**options)
    if made.state_dict().keys() != model.state_dict().keys():
        odd = sorted(made.state_dict().keys() ^ model.state_dict().keys())
        raise ModelError(
            f"the tower ends without a matrix that the tuned projections could be folded into, and with one it is "
            f"another ({', '.join(odd[:2])}); tune with `train: prototypes` or `train: last_blocks`"
        )
