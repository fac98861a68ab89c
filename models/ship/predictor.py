"""Prediction with an exported model: the folder that `latteflow export` wrote, and nothing else.

An image of none of the classes is told by its energy (Liu et al. 2020, arXiv 2010.03759, equation 4), with the model's
own temperature: ``log sum_c exp(scale * cosine_c) / scale``, a soft maximum of its cosines with the prototypes.
docs/serving.md has it beside other scores that need no label.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from latteflow.models.digests import digest_of_file
from latteflow.models.errors import ModelError
from latteflow.models.judge import metrics
from latteflow.models.settings import ClipSettings, grey_range
from latteflow.models.towers import clip
from latteflow.models.towers.folder import (
    CLASSES_FILE,
    HEAD_FILE,
    SCHEMA,
    SCHEMA_VERSION,
    SETTINGS_FILE,
    check_files,
    read_json,
)
from latteflow.models.towers.images import Reading

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

UNKNOWN_SHARE = 0.01
"""Of new images of the domain, that are to be called *unknown*."""


@dataclass(frozen=True)
class Answers(metrics.Predictions):
    """What a model says of n images.

    Attributes:
        score: negative energy, ``(n,)``; between the largest cosine and that plus ``log(classes) / scale``.
        unknown: whether the score is lower than that of nearly all images of the domain, ``(n,)`` bool; None where it
            is not known how low that is.
    """

    score: np.ndarray
    unknown: np.ndarray | None


@dataclass(frozen=True)
class Head:
    """From image embeddings to answers: the one place where probabilities come from.

    Attributes:
        prototypes: unit rows, ``(classes, dim)``.
        centre: subtracted from embeddings before they are normalised, ``(dim,)``.
        scale: of the logits, and of the score.
        unknown_below: an image with a lower score is *unknown*; None: nobody can tell.
        temperature: what logits are divided by before the softmax, so that probabilities are about as often right as
            they say (:mod:`models.judge.calibration`); at least 1.
    """

    prototypes: np.ndarray
    centre: np.ndarray
    scale: float
    unknown_below: float | None
    temperature: float = 1.0

    def answers(self, embeds: np.ndarray, keep: int = 5) -> Answers:
        """The best classes of image embeddings ``(n, dim)``; at most ``keep``."""
        moved = embeds - self.centre
        features = moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)
        logits = self.scale * (features @ self.prototypes.T).astype(np.float64)
        score = _scores(logits, self.scale)
        unknown = None if self.unknown_below is None else score < self.unknown_below
        return Answers(**vars(metrics.ranked(logits / self.temperature, keep)), score=score, unknown=unknown)


def scores(features: np.ndarray, prototypes: np.ndarray, scale: float) -> np.ndarray:
    """The score of images, ``(n,)``.

    Args:
        features: unit rows ``(n, dim)``.
        prototypes: unit rows ``(classes, dim)``.
    """
    return _scores(scale * (features @ prototypes.T).astype(np.float64), scale)


def unknown_below(held_out: np.ndarray) -> float | None:
    """The score that at most a share of :data:`UNKNOWN_SHARE` of new images does not reach; None: of too few to tell.

    As a new image may take any place among them, the k-th lowest of n scores is missed with probability k / (n + 1)
    (split conformal prediction; Vovk et al. 2005).

    Args:
        held_out: scores of images that the model has not learnt from, ``(n,)``.
    """
    place = math.floor(UNKNOWN_SHARE * (len(held_out) + 1))
    return float(np.sort(held_out)[place - 1]) if place else None


def _scores(logits: np.ndarray, scale: float) -> np.ndarray:
    most = logits.max(axis=1)
    return (most + np.log(np.exp(logits - most[:, None]).sum(axis=1))) / scale


class Predictor:
    """An exported model, ready to use; safe to call from several threads.

    Attributes:
        classes: names, in the order of the answers' numbers.
        reading: how it is shown pictures.
        clip: the model's own towers, learnt maps folded in.
        head: the classifier.
        fingerprint: hex digits that another export of the same model does not have; empty if it is of no folder.
    """

    def __init__(
        self,
        model: clip.Clip,
        head: Head,
        classes: Sequence[str],
        resize: Literal["crop", "pad"],
        greys: Literal["auto", "full"] | tuple[float, float] = "auto",
        fingerprint: str = "",
    ) -> None:
        from PIL import Image

        self.fingerprint = fingerprint

        self.clip, self.head, self.classes = model, head, list(classes)
        self.reading = Reading(max(model.preprocess(Image.new("RGB", (64, 64))).shape[1:]), resize, greys)

    @classmethod
    def load(cls, folder: Path) -> Predictor:
        """Read the folder.

        Raises:
            ModelError: it is not an exported model, a file is missing or not the one that was written, or a number in
                it is not finite.
        """
        settings = _settings(folder)
        with ThreadPoolExecutor(1) as beside:
            checked = beside.submit(_check_digests, folder, settings["sha256"])
            import torch  # seconds, which a folder that is none is told without

            checked.result()
        try:
            classes, head = _classes(folder), _head(folder, settings)
            greys = grey_range(settings.get("grey_range", "auto"))
        except Exception as error:  # safetensors has exceptions of its own
            raise ModelError(f"model {folder}: {type(error).__name__}: {error}; export it again") from error
        if len(classes) != len(head.prototypes):
            raise ModelError(
                f"model {folder}: {CLASSES_FILE} names {len(classes)} classes, the classifier has "
                f"{len(head.prototypes)}; change names, not their number or order"
            )
        model = clip.read(ClipSettings(model=str(folder.resolve()), resize=settings["resize"]))
        for name, tensor in model.model.state_dict().items():
            # Of a sum first, which is a tenth of the work and never finite where a number is not.
            if tensor.is_floating_point() and not (torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all()):
                raise ModelError(f"model {folder}: {name} holds a number that is not finite; export it again")
        if model.dim != head.prototypes.shape[1]:
            raise ModelError(
                f"model {folder}: its images have {model.dim} dimensions, the classifier {head.prototypes.shape[1]}; "
                "export it again"
            )
        return cls(model, head, classes, settings["resize"], greys, digest_of_file(folder / SETTINGS_FILE)[:12])

    def pixels(self, image: Image, white: int | None = None) -> torch.Tensor:
        """A picture that was opened and not decoded yet, as the model reads it: ``(3, height, width)`` float32.

        Arguments and errors are those of :meth:`models.towers.images.Reading.shown`.
        """
        return self.clip.preprocess(self.reading.shown(image, white))

    def answers(self, pixels: torch.Tensor, keep: int = 5) -> Answers:
        """What the model says of ``(n, 3, height, width)``; the best ``keep`` classes of each."""
        return self.head.answers(self.clip.image_embeds(pixels).numpy(), keep)

    def predict(self, images: Sequence[Image], keep: int = 5) -> Answers:
        """What the model says of some pictures, opened by PIL; the best ``keep`` classes of each."""
        import torch

        return self.answers(torch.stack([self.pixels(image) for image in images]), keep)


def _settings(folder: Path) -> dict[str, Any]:
    """What `export` noted."""
    if not folder.is_dir():
        raise ModelError(f"model {folder}: there is no such folder; `latteflow export DOMAIN {folder}` writes one")
    check_files(folder)
    try:
        found: dict[str, Any] = read_json(folder / SETTINGS_FILE)
        schema, found["sha256"] = (found["schema"], found["version"]), dict(found["sha256"])
    except FileNotFoundError:
        raise ModelError(f"model {folder}: it has no {SETTINGS_FILE}; `latteflow export` writes it") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"model {folder}: {SETTINGS_FILE} cannot be read ({error!r}); export the model again"
        ) from error
    if schema != (SCHEMA, SCHEMA_VERSION):
        raise ModelError(f"model {folder}: it is a {schema}, not a {(SCHEMA, SCHEMA_VERSION)}; export the model again")
    return found


def _check_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Whether every file that `export` noted is there, and is the one that it wrote."""
    for name, digest in digests.items():
        path = folder / name
        if path.parent != folder:
            raise ModelError(f"model {folder}: {SETTINGS_FILE} names {name!r}, which is not in the folder")
        if not path.is_file():
            raise ModelError(f"model {folder}: {name} is missing; copy the whole folder, or export the model again")
        if (content := digest_of_file(path)) != digest:
            raise ModelError(
                f"model {folder}: {name} has sha256 {content[:12]}, was exported with {digest[:12]}; copy the folder "
                "again, or export the model again"
            )


def _classes(folder: Path) -> list[str]:
    classes = read_json(folder / CLASSES_FILE)
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{CLASSES_FILE} is not a list of names")
    if len(set(classes)) != len(classes):
        raise ValueError(f"{CLASSES_FILE} names a class twice")
    return classes


def _head(folder: Path, settings: dict[str, Any]) -> Head:
    from safetensors.numpy import load_file

    found = load_file(folder / HEAD_FILE)
    below, temperature = settings["unknown_below"], float(settings.get("temperature", 1.0))  # not in older folders
    below = None if below is None else float(below)
    head = Head(found["prototypes"], found["centre"], float(found["scale"][0]), below, temperature)
    if not all(np.isfinite(part).all() for part in vars(head).values() if part is not None):
        raise ValueError(f"{HEAD_FILE} or {SETTINGS_FILE} holds a number that is not finite")
    if temperature < 1:
        raise ValueError(f"the temperature in {SETTINGS_FILE} is {temperature:g}, and 1 is the least")
    if head.prototypes.ndim != 2 or head.centre.shape != head.prototypes.shape[1:]:
        raise ValueError(f"prototypes {head.prototypes.shape} and centre {head.centre.shape} do not belong together")
    return head
