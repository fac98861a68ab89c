"""A second image tower that says which images are alike: any of timm, or the images' side of a CLIP.

It is frozen, reads no texts and classifies nothing. That its mistakes are not the CLIP's is all that it is for.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from latteflow.models.digests import digest_of_file
from latteflow.models.errors import ModelError
from latteflow.models.settings import ClipSettings, NeighbourSettings
from latteflow.models.towers import clip

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

TIMM = "timm/"


class Tower(Protocol):
    """What is wanted of it; see :class:`models.towers.clip.Clip`, which is one."""

    @property
    def preprocess(self) -> Callable[[Image], torch.Tensor]: ...
    @property
    def dim(self) -> int: ...
    def image_embeds(self, pixels: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class TimmTower:
    """A model of timm without its classifier."""

    model: torch.nn.Module
    preprocess: Callable[[Image], torch.Tensor]
    dim: int

    def image_embeds(self, pixels: torch.Tensor) -> torch.Tensor:
        """``(n, 3, h, w)`` -> ``(n, dim)`` float32, not normalised, without gradient."""
        import torch

        with torch.inference_mode():
            device = next(self.model.parameters()).device
            return self.model(pixels.to(device)).float().cpu()


def identity(settings: NeighbourSettings) -> dict[str, Any]:
    """What tells this tower from any other, for fingerprints; see :func:`models.towers.clip.identity`."""
    if not settings.model.startswith(TIMM):
        with _named():
            return clip.identity(_as_clip(settings))
    found: dict[str, Any] = settings.model_dump()
    if settings.pretrained:
        found |= {"pretrained": "file", "revision": digest_of_file(_weights(settings.pretrained))}
    return found


def check(settings: NeighbourSettings) -> None:
    """Whether the tower can be had, as far as that can be said without its weights.

    Raises:
        ModelError: unknown name or weights, with the nearest known names.
    """
    if not settings.model.startswith(TIMM):
        with _named():
            clip.check(_as_clip(settings))
        return
    import timm

    name = settings.model.removeprefix(TIMM)
    known = timm.list_models() if settings.pretrained else timm.list_pretrained()
    if settings.pretrained:
        _weights(settings.pretrained)
    if name not in known:
        near = difflib.get_close_matches(name, known, 3, 0.5)
        hint = f"; did you mean {' or '.join(TIMM + each for each in near)}?" if near else ""
        wanted = "model" if settings.pretrained else "model with published weights, NAME.WEIGHTS"
        raise ModelError(f"neighbours.model {settings.model!r} is no {wanted} of timm{hint}")


def read(settings: NeighbourSettings) -> Tower:
    """Load the tower, on the GPU if there is one.

    Raises:
        ModelError: unknown name, or weights that cannot be had or do not fit.
    """
    if not settings.model.startswith(TIMM):
        with _named():
            return clip.read(_as_clip(settings))
    check(settings)
    import numpy as np
    import timm
    import torch
    from safetensors.torch import load_file
    from timm.data import create_transform, resolve_model_data_config

    name, file = settings.model.removeprefix(TIMM), settings.pretrained
    try:
        model: Any = timm.create_model(name, pretrained=file is None, num_classes=0)
        if file is not None:
            # By hand: where the classifier is dropped, timm takes the file of any other model, with a warning.
            weights, classifier = load_file(file), np.atleast_1d(model.default_cfg["classifier"])
            model.load_state_dict(
                {key: value for key, value in weights.items() if key.rpartition(".")[0] not in classifier}
            )
    except Exception as error:  # hub clients and checkpoints fail in many ways
        raise ModelError(
            f"neighbours.model {settings.model!r} with pretrained {settings.pretrained!r} cannot be loaded "
            f"({type(error).__name__}: {error}); check the connection and the file"
        ) from error
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    size = resolve_model_data_config(model)
    if settings.resize == "pad":
        size["crop_pct"] = 1.0  # the rim is part of the picture
    prepare = functools.partial(
        clip.prepare, transform=create_transform(**size), fit=settings.resize, side=max(size["input_size"][1:])
    )
    return TimmTower(model, prepare, model.num_features)


def _as_clip(settings: NeighbourSettings) -> ClipSettings:
    return ClipSettings(**settings.model_dump())


@contextlib.contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except ModelError as error:
        raise ModelError(f"neighbours: {error}") from None


def _weights(path: str) -> Path:
    if not path.endswith(".safetensors") or not Path(path).is_file():
        raise ModelError(
            f"neighbours.pretrained {path!r} is no .safetensors file that is there; pickled weights are not read"
        )
    return Path(path)
