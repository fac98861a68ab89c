"""What CLAMP learned, as one file: prompts, pool, scale and LoRA; tens of megabytes, without the language model.

The header of the safetensors file holds, as JSON under `clamp`, the settings that shape the tower, the identity of the
language model and the digest of the sentence around each text.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import load, save

from latteflow.models.errors import ModelError
from latteflow.models.methods.clamp import ClampSettings, lm
from latteflow.models.methods.clamp.tower import ClampTower

SCHEMA = 1
_OF_THE_TOWER = {
    "dtype", "prompts", "prompt_mask", "pool_heads", "wrapper", "max_tokens", "lora_rank", "lora_alpha", "lora_dropout",
    "lora_targets",
}  # fmt: skip


def pack(tower: ClampTower) -> bytes:
    """The file of a tower. The same tower gives the same bytes."""
    about = {
        "schema": SCHEMA,
        "settings": tower.settings.model_dump(mode="json", include=_OF_THE_TOWER),
        "lm": lm.identity(tower.settings),
        "wrapper": tower.wrapper.digest,
        "width": tower.pool.out.out_features,
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in sorted(tower.adapter().items())}
    return save(tensors, {"clamp": json.dumps(about, sort_keys=True)})


def unpack(data: bytes, name: str | None = None, device: torch.device | str = "cpu") -> ClampTower:
    """The tower of a file, ready to read texts.

    Args:
        name: of the language model, as `clamp.lm`; needed where it was a folder.

    Raises:
        ModelError: this is no such file, it was written by another version, or the language model is another one.
    """
    about = _header(data)
    known, cfg = about["lm"], about["settings"]
    if name is None and known["lm"] == "folder":
        raise ModelError("the adapter's language model was a folder; say where it is")
    published = {} if known["lm"] in ("folder", "embedded") else {"revision": known["revision"]}
    settings = ClampSettings(lm=name or known["lm"], **published, **cfg)
    if (found := lm.identity(settings)) != known:
        raise ModelError(f"the adapter belongs to the language model {known}, and {settings.lm!r} is {found}")
    model, tokenizer = lm.load(settings, device)
    tower = ClampTower(model, tokenizer, settings, about["width"])
    if tower.wrapper.digest != about["wrapper"]:
        raise ModelError(f"the sentence `wrapper: {settings.wrapper}` is not the one the adapter was trained with")
    tower.load_adapter(load(data))
    return tower.eval()


def _header(data: bytes) -> dict[str, Any]:
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about: dict[str, Any] = json.loads(header["__metadata__"]["clamp"])
        version = about["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"this is not the adapter of a CLAMP tower ({error!r})") from error
    if version != SCHEMA:
        raise ModelError(f"the adapter has schema {version}, not {SCHEMA}; tune again")
    return about
