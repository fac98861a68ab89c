"""Export: an adapted model as a folder that open_clip (or, for the embedded model, this package) loads by itself.

Files: the model (``open_clip_config.json`` and ``open_clip_model.safetensors``, or the embedded model's own three), and
beside it the classifier, ``classifier.safetensors`` (prototypes, centre, scale) with ``classes.json``. For one image:
``scale * unit(encode_image(pixels) - centre) @ prototypes.T``. ``latteflow.json``, written last, says how pictures are
resized, what logits are divided by for calibrated probabilities, from which score on an image is *unknown*, and which
bytes the other files have.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn

from models.digests import digest_of_file
from models.errors import ModelError
from models.towers.clip import Clip
from models.towers.embedded import EmbeddedClip
from models.towers.embedded import save as save_embedded
from models.towers.folder import (
    CLASSES_FILE,
    HEAD_FILE,
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    SCHEMA,
    SCHEMA_VERSION,
    SETTINGS_FILE,
    write_json,
)

# Where towers keep the matrix that ends them, as open_clip names them.
IMAGE_PROJECTIONS = ("image_projection", "visual.proj", "visual.head.proj", "visual.attnpool.c_proj")
TEXT_PROJECTIONS = ("text_projection", "text.text_projection", "text.proj")


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
    model = copy.deepcopy(clip.model)
    if image_map is not None:
        fold(model, IMAGE_PROJECTIONS, image_map)
        centre = centre @ image_map
    if text_map is not None:
        fold(model, TEXT_PROJECTIONS, text_map)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        model.logit_scale.fill_(torch.tensor(scale).log())  # type: ignore[operator]
    if isinstance(model, EmbeddedClip):
        save_embedded(model, folder)
    else:
        _save_open_clip(clip, model, folder)
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


def fold(model: nn.Module, places: Sequence[str], change: Tensor) -> None:
    """Multiply a map on the right of a tower's embeddings into the matrix that ends the tower.

    Raises:
        ModelError: none of the places is a matrix or a linear layer.
    """
    with torch.no_grad():
        for place in places:
            owner: Any = model
            for name in place.split("."):
                owner = getattr(owner, name, None)
            if isinstance(owner, nn.Linear):
                owner.weight.copy_(change.T @ owner.weight)
                if owner.bias is not None:
                    owner.bias.copy_(owner.bias @ change)
                return
            if isinstance(owner, nn.Parameter):
                owner.copy_(owner @ change)
                return
    raise ModelError(
        f"{type(model).__name__} has none of {', '.join(places)}, so the tuned projections cannot be folded into it; "
        "tune with `train: prototypes` or `train: last_blocks`"
    )


def _save_open_clip(clip: Clip, model: nn.Module, folder: Path) -> None:
    import open_clip

    name = clip.name if not Path(clip.name).is_dir() else f"local-dir:{clip.name}"
    config = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": dict(model.visual.preprocess_cfg)}  # type: ignore[union-attr,arg-type]
    state = {key: tensor.contiguous().clone() for key, tensor in model.state_dict().items()}
    (folder / OPEN_CLIP_WEIGHTS).write_bytes(save(state))
    write_json(folder / OPEN_CLIP_CONFIG, config)
    if hasattr(clip.tokenizer, "save_pretrained"):  # of Hugging Face; open_clip looks for it in the folder
        clip.tokenizer.save_pretrained(str(folder))
