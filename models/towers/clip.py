"""Any CLIP as one object: open_clip by name, an open_clip folder, or the embedded model."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from latteflow.models.digests import digest_of_file
from latteflow.models.errors import ModelError
from latteflow.models.settings import ClipSettings
from latteflow.models.towers.folder import TEXT_CONFIG, check_files

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image


EMBEDDED_REVISION = "1"
"""Raised whenever the embedded model's features change."""
EMBEDDED_NOTE = (
    "This is not a CLIP. It is the fallback for people without CLIP weights: an ImageNet image tower and a sentence "
    "encoder, joined without an image. `clip: {model: ViT-B-32, pretrained: laion2b_s34b_b79k}` runs the real thing."
)
_EMBEDDED_CONFIG, _OPEN_CLIP_CONFIG = "latteflow_embedded.json", "open_clip_config.json"
_MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
_ENDLESS = 2000
"""Words that no text tower reads to the end."""


@dataclass
class Clip:
    """A dual encoder, ready to use.

    Attributes:
        model: module with ``encode_image(pixels)``, ``encode_text(tokens)`` and ``logit_scale`` like open_clip's.
        tokenizer: list of n strings -> ``(n, context)`` int64.
        preprocess: any PIL image -> ``(3, height, width)`` float32, the evaluation transform. Large JPEGs that are not
            decoded yet are decoded smaller, see :func:`models.towers.images.reduced`.
        dim: width of the joint embedding.
        note: what a reader of results should know about this model; empty for an ordinary CLIP.
    """

    name: str
    model: torch.nn.Module
    tokenizer: Callable[[list[str]], torch.Tensor]
    preprocess: Callable[[Image], torch.Tensor]
    dim: int
    note: str = ""

    def image_embeds(self, pixels: torch.Tensor) -> torch.Tensor:
        """``(n, 3, h, w)`` -> ``(n, dim)`` float32, not normalised, without gradient."""
        import torch

        from latteflow.models.products import fast_products

        with torch.inference_mode(), fast_products():
            # CoCa's own default is to normalise.
            pixels = pixels.to(self.device, non_blocking=True)
            return self.model.encode_image(pixels, normalize=False).float().cpu()  # type: ignore[operator]

    def text_features(self, texts: Sequence[str], batch: int = 256) -> np.ndarray:
        """Unit rows ``(len(texts), dim)`` float32; equal texts are encoded once."""
        import numpy as np
        import torch

        from latteflow.models.products import fast_products

        distinct = sorted(set(texts), key=lambda text: (len(text), text))
        rows = []
        with torch.inference_mode(), fast_products():
            for start in range(0, len(distinct), batch):
                tokens = self.tokenizer(distinct[start : start + batch]).to(self.device)
                embeds = self.model.encode_text(tokens)  # type: ignore[operator]
                rows.append(torch.nn.functional.normalize(embeds.float(), dim=-1).cpu().numpy())
        features = np.concatenate(rows) if rows else np.zeros((0, self.dim), np.float32)
        place = {text: index for index, text in enumerate(distinct)}
        return features[[place[text] for text in texts]]

    def too_long(self, texts: Sequence[str], batch: int = 1024) -> np.ndarray:
        """Which texts the tokenizer cuts off, ``(len(texts),)`` bool; one that just fits counts as cut."""
        import numpy as np

        # Tokenizers pad to the context or to the longest text; two lengths show where it ends and what pads.
        probe = self.tokenizer(["a", "a " * _ENDLESS])
        context, padding = probe.shape[1], int(probe[0, -1])
        found = np.zeros(len(texts), bool)
        # No tokenizer makes more tokens than there are bytes.
        long = [place for place, text in enumerate(texts) if len(text.encode(errors="replace")) + 2 >= context]
        for start in range(0, len(long), batch):
            part = long[start : start + batch]
            tokens = self.tokenizer([texts[place] for place in part])
            found[part] = tokens.shape[1] == context and (tokens[:, -1] != padding).numpy()
        return found

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    @property
    def scale(self) -> float:
        """exp(logit_scale)."""
        return float(self.model.logit_scale.detach().exp())  # type: ignore[operator]


def class_features(text_features: np.ndarray, templates: int) -> np.ndarray:
    """Mean direction of each class's prompts.

    Args:
        text_features: unit rows ``(classes * templates, dim)``, class by class.

    Returns:
        Unit rows ``(classes, dim)``.
    """
    import numpy as np

    mean = text_features.reshape(-1, templates, text_features.shape[1]).mean(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def identity(settings: ClipSettings) -> dict[str, Any]:
    """What tells this model from any other, for fingerprints: names for published weights, digests for local files."""
    found: dict[str, Any] = {"model": settings.model, "pretrained": settings.pretrained, "resize": settings.resize}
    folder = _folder(settings.model)
    if settings.model == "embedded":
        found["revision"] = EMBEDDED_REVISION
    elif folder is not None:
        found["model"] = "folder"
        # Vocabularies are .json, .txt or .model.
        found["revision"] = _digest([path for kind in _MODEL_FILES for path in sorted(folder.glob(kind))])
    elif settings.pretrained and Path(settings.pretrained).is_file():
        found["pretrained"] = "file"
        found["revision"] = _digest([Path(settings.pretrained)])
    return found


def check(settings: ClipSettings) -> None:
    """Whether the model can be had, as far as that can be said without its weights.

    Raises:
        ModelError: unknown name or weights, with the nearest known names; a package that is not installed; a folder
            that is no open_clip folder; a tower that does not take images of the size that its folder says.
    """
    if settings.model.startswith("hf-hub:"):
        return
    if settings.model == "embedded":
        from latteflow.models.towers.embedded import check_embedded

        check_embedded(cache_folder())
        return
    folder = _folder(settings.model)
    if folder is None:
        _check_name(settings.model)
        _check_weights(settings.model, settings.pretrained)
    elif not (folder / _EMBEDDED_CONFIG).is_file():
        _check_folder(settings.model, folder)


@functools.lru_cache(maxsize=1)
def load(settings: ClipSettings) -> Clip:
    """As :func:`read`. The last is kept: callers never change it, they copy."""
    return read(settings)


def read(settings: ClipSettings) -> Clip:
    """Load the model for inference, on the GPU if there is one.

    Raises:
        ModelError: unknown name or weights, unreadable folder, missing package; with the nearest known names.
    """
    import torch

    found = _load_embedded(settings) if settings.model == "embedded" else _load_open_clip(settings)
    found.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return found


def _load_embedded(settings: ClipSettings) -> Clip:
    from latteflow.models.towers.embedded import build_embedded

    model = build_embedded(cache_folder())
    return Clip("embedded", model, model.tokenizer, model.preprocess(settings.resize), model.dim, EMBEDDED_NOTE)


def _load_open_clip(settings: ClipSettings) -> Clip:
    check(settings)
    name, pretrained = settings.model, settings.pretrained
    folder, towers = _folder(name), dict[str, Any]()
    if folder is not None:
        if (folder / _EMBEDDED_CONFIG).is_file():
            from latteflow.models.towers.embedded import load as load_embedded

            try:
                embedded = load_embedded(folder)
            except ModelError:
                raise
            except Exception as error:  # of safetensors, of tokenizers, of torch about tensors that do not fit
                raise ModelError(
                    f"clip.model {name!r} cannot be loaded ({type(error).__name__}: {error}); export it again"
                ) from error
            preprocess = embedded.preprocess(settings.resize)
            return Clip(name, embedded, embedded.tokenizer, preprocess, embedded.dim, EMBEDDED_NOTE)
        name, pretrained = f"local-dir:{folder}", None
        if (folder / TEXT_CONFIG).is_file():  # no need to ask the model hub for it
            text = _shape_of_folder(name, folder)["text_cfg"]
            towers["text_cfg"] = {**text, "hf_model_name": str(folder / TEXT_CONFIG), "hf_model_pretrained": False}
    import open_clip  # with transformers: a second that the embedded model is loaded without
    import torch

    try:
        model, _, transform = open_clip.create_model_and_transforms(
            name, pretrained=pretrained, precision="fp32", **towers
        )
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:
        # Hub clients, tokenizers and checkpoints fail in many ways; all mean that this model cannot be had here.
        raise ModelError(
            f"clip.model {settings.model!r} with pretrained {settings.pretrained!r} cannot be loaded "
            f"({type(error).__name__}: {error}); check the connection, or give an open_clip folder"
        ) from error
    model.eval()
    size: Any = model.visual.image_size
    side = size if isinstance(size, int) else max(size)
    prepared = functools.partial(prepare, transform=transform, fit=settings.resize, side=side)
    with torch.inference_mode():
        dim = model.encode_text(tokenizer(["a"])).shape[1]
    return Clip(settings.model, model, tokenizer, prepared, dim)


def _check_name(name: str) -> None:
    known = _shipped()
    if name not in known:
        near = difflib.get_close_matches(name, [*known, "embedded"], 3, 0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ModelError(
            f"clip.model {name!r} is neither an open_clip name nor a folder with {_OPEN_CLIP_CONFIG} beside the domain "
            f"file{hint}"
        )


def _check_weights(name: str, pretrained: str | None) -> None:
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None or (pretrained not in tags and not Path(pretrained).is_file()):
        raise ModelError(
            f"clip.pretrained {pretrained!r} names no weights of {name}; "
            f"choose from {', '.join(tags) or '(none are published)'}"
        )
    # open_clip would load them with a warning, and every feature would be another.
    if get_pretrained_cfg(name, pretrained).get("quick_gelu") and not (open_clip.get_model_config(name) or {}).get(
        "quick_gelu"
    ):
        raise ModelError(
            f"clip.pretrained {pretrained!r} was trained with quick GELU, and {name} computes with plain GELU; take "
            f"clip.model {name}-quickgelu"
        )


def shape(settings: ClipSettings) -> dict[str, Any] | None:
    """open_clip's configuration of the model, read without open_clip; None for the embedded model and for one that
    only the model hub knows.

    Raises:
        ModelError: unknown name, or a folder that has none.
    """
    if settings.model == "embedded" or settings.model.startswith("hf-hub:"):
        return None
    folder = _folder(settings.model)
    if folder is None:
        _check_name(settings.model)
        return dict(json.loads(_shipped()[settings.model].read_text(encoding="utf-8")))
    return None if (folder / _EMBEDDED_CONFIG).is_file() else _shape_of_folder(settings.model, folder)


def _shipped() -> dict[str, Path]:
    """Files with the configurations of open_clip's models by name; to import it takes seconds."""
    found = importlib.util.find_spec("open_clip")
    if found is None or found.origin is None:
        raise ModelError("open_clip is not installed; run: pip install open_clip_torch")
    return {path.stem: path for path in sorted((Path(found.origin).parent / "model_configs").glob("*.json"))}


def _shape_of_folder(name: str, folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / _OPEN_CLIP_CONFIG).read_text(encoding="utf-8"))["model_cfg"]
        return {**config, "vision_cfg": dict(config["vision_cfg"]), "text_cfg": dict(config["text_cfg"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(
            f"clip.model {name!r}: {_OPEN_CLIP_CONFIG} of the folder cannot be loaded ({type(error).__name__}: "
            f"{error}); give a folder as open_clip's `save_pretrained` or `latteflow export` writes it"
        ) from error


def _check_folder(name: str, folder: Path) -> None:
    vision = _shape_of_folder(name, folder)["vision_cfg"]
    trunk, size = vision.get("timm_model_name"), vision.get("image_size", 224)
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"clip.model {name!r}: the folder has no .safetensors weights; pickled ones are not read")
    if trunk is not None:
        _check_size(name, trunk, size)


def _check_size(name: str, trunk: str, size: Any) -> None:
    """Whether a tower of timm, which is built for its own size whatever the folder says, takes images of that size."""
    import timm
    import torch

    try:
        with torch.device("meta"):
            tower: Any = timm.create_model(trunk, pretrained=False).eval()
    except Exception as error:  # unknown, or not what this version of timm can build
        raise ModelError(
            f"clip.model {name!r}: timm has no tower {trunk!r} ({error}); correct `timm_model_name` in "
            f"{_OPEN_CLIP_CONFIG}, or install the timm that has it"
        ) from error
    said, own = [size, size] if isinstance(size, int) else list(size), list(tower.default_cfg["input_size"][1:])
    if said == own:
        return
    try:
        with torch.no_grad():
            tower(torch.empty(1, 3, *said, device="meta"))
    except Exception as error:  # an AssertionError of some layers, shapes that do not fit of others
        raise ModelError(
            f"clip.model {name!r}: {_OPEN_CLIP_CONFIG} says images of {said[0]} x {said[1]} pixels, and its tower, "
            f"{trunk}, takes {own[0]} x {own[1]}; correct `image_size` in `vision_cfg`"
        ) from error


def prepare(
    image: Image, *, transform: Callable[[Image], torch.Tensor], fit: Literal["crop", "pad"], side: int
) -> torch.Tensor:
    """A picture, as a tower's own transform takes it.

    Args:
        transform: of RGB pictures, to ``(3, height, width)``.
        fit: `clip.resize`.
        side: of the square that the tower reads, in pixels.
    """
    from PIL import ImageOps

    from latteflow.models.towers.images import reduced, to_rgb

    image = to_rgb(reduced(image, side, fit))
    if fit == "pad":
        image = ImageOps.pad(image, (max(image.size),) * 2, color=(255, 255, 255))
    return transform(image)


def cache_folder() -> Path:
    """Where built models are kept between runs: $LATTEFLOW_CACHE, else ~/.cache/latteflow."""
    return Path(os.environ.get("LATTEFLOW_CACHE") or Path.home() / ".cache" / "latteflow")


def _folder(model: str) -> Path | None:
    if not model.startswith(("/", "local-dir:")):
        return None
    path = Path(model.removeprefix("local-dir:"))
    if not path.is_dir():
        raise ModelError(f"clip.model {model!r}: there is no such folder")
    check_files(path)
    return path


def _digest(paths: Sequence[Path]) -> str:
    digests = {path.name: digest_of_file(path) for path in paths}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
