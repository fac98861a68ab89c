"""An exported model as ONNX: image tower and classifier in one graph, for runtimes without PyTorch."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latteflow.models.errors import ModelError
from latteflow.models.ship.predictor import Head
from latteflow.models.towers.embedded import EmbeddedClip
from latteflow.models.towers.folder import ONNX_FILE

if TYPE_CHECKING:
    from latteflow.models.ship.predictor import Predictor

OPSET = 18
MOST_DIFFERENCE = 1e-3
"""Between a probability by PyTorch and by ONNX Runtime; more is an error."""
MOST_OF_FEATURES = 1e-4
"""The same of unit features."""
_ONE_FILE = 1 << 30
"""Larger weights go into a file beside the graph: protobuf ends at 2 GB."""


class Classifier(nn.Module):
    """Pixels as the model reads them, ``(n, 3, height, width)`` -> unit features ``(n, dim)`` and logits."""

    def __init__(self, model: Any, head: Head) -> None:
        super().__init__()
        self.model, self.scale = model, head.scale
        self.prototypes: Tensor
        self.centre: Tensor
        self.register_buffer("prototypes", torch.from_numpy(head.prototypes))
        self.register_buffer("centre", torch.from_numpy(head.centre))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        model = self.model
        if isinstance(model, EmbeddedClip):  # its own way, twice as fast in PyTorch, cannot be traced
            embeds = (model.visual(pixels) - model.image_mean) @ model.image_projection
        else:
            embeds = model.encode_image(pixels, normalize=False)
        features = F.normalize(embeds - self.centre, dim=-1)
        return features, self.scale * features @ self.prototypes.T


def to_onnx(predictor: Predictor, folder: Path) -> float:
    """Write ``model.onnx``: ``pixels (n, 3, height, width)`` -> ``features (n, dim)``, ``logits (n, classes)``.

    Probabilities are the softmax of the logits divided by the folder's temperature; the largest logit divided by the
    scale is the score.

    Returns:
        The largest difference between probabilities by PyTorch and by ONNX Runtime, of noise, one image and several.

    Raises:
        ModelError: a package is missing, the tower cannot be traced, or the graph does not say the same.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ModelError(f"ONNX needs the package {error.name}; run: pip install 'latteflow[onnx]'") from error
    model = Classifier(predictor.clip.model.cpu(), predictor.head).eval()
    pixels = noise(predictor, 3)
    path = folder / ONNX_FILE
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.model.visual.state_dict().values())
    with _quiet():
        try:
            torch.onnx.export(
                model,
                (pixels,),
                path,
                input_names=["pixels"],
                output_names=["features", "logits"],
                dynamic_shapes=({0: torch.export.Dim("n", min=1)},),
                opset_version=OPSET,
                external_data=weights > _ONE_FILE,
                verbose=False,
            )
        except Exception as error:  # the exporter raises what each operator trips over
            why = _first_cause(error)
            raise ModelError(f"PyTorch's exporter cannot write this image tower as ONNX: {why}") from error
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    difference = of_features = 0.0
    with torch.inference_mode():
        for n in (1, 3):
            asked = session.run(["features", "logits"], {"pixels": pixels[:n].numpy()})
            (features, logits), ours = map(torch.from_numpy, asked), model(pixels[:n])
            of_features = max(of_features, float((features - ours[0]).abs().max()))
            difference = max(difference, float((logits.softmax(1) - ours[1].softmax(1)).abs().max()))
    if not (difference <= MOST_DIFFERENCE and of_features <= MOST_OF_FEATURES):
        path.unlink()
        raise ModelError(
            f"ONNX Runtime differs from PyTorch by {difference:.2g} in a probability and {of_features:.2g} in a unit "
            "feature; the file was removed"
        )
    return difference


def noise(predictor: Predictor, n: int) -> Tensor:
    """Pixels about as large as those of images, the same every time."""
    from PIL import Image

    shape = predictor.pixels(Image.new("RGB", (64, 64))).shape
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))


def _first_cause(error: BaseException) -> str:
    """What the exporter tripped over, in a line; around it the exporter puts pages about reporting it."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0] if said else ''}"[:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says about itself."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
