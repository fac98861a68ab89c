"""What every method is given of a domain, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from latteflow.models.methods.training import Stats
from latteflow.models.rows import Matrix, Rows, in_memory, through
from latteflow.models.vectors import at_least_float32, unit

Pixels = Callable[[Tensor, Tensor | None], Tensor]
"""Image numbers ``(b,)`` to pixels ``(b, 3, h, w)``: by seeds ``(b,)`` augmented views, by None as for testing."""


Data = TypeVar("Data", "PairData", "CaptionData", "TuneData")


def _moved(data: Data, device: torch.device) -> Data:
    values = {f.name: getattr(data, f.name) for f in fields(data)}
    moved: Any = {
        name: value.to(device)
        for name, value in values.items()
        if isinstance(value, (Tensor, Rows, PairData, CaptionData))
    }
    return replace(data, **moved)


@dataclass(frozen=True, kw_only=True)
class PairData:
    """Texts about how the first image of a pair differs from the second.

    Texts are int64 tokens, padded with 0, or floating-point text embeds.

    Args:
        first, second: image numbers, `(p,)` int64.
        texts: `(p, length or dim)`.
        class_pairs: classes a, b of each text about classes, `(c, 2)` int64; None when there are none.
        class_texts: how class a differs from class b, `(c, length or dim)`.
    """

    first: Tensor
    second: Tensor
    texts: Tensor
    class_pairs: Tensor | None = None
    class_texts: Tensor | None = None

    def to(self, device: torch.device) -> PairData:
        """The same, with every tensor on this device."""
        return _moved(self, device)


@dataclass(frozen=True, kw_only=True)
class CaptionData:
    """The texts themselves, for a method that reads them with a tower of its own.

    Args:
        texts: every text, once: descriptions of images and groups, class names.
        teacher: the CLIP's own unit features of the texts, `(texts, dim)`.
        image_texts: number of each image's description, `(n,)` int64; -1 where there is none.
        group_texts: for each image the numbers of the descriptions of groups it is in.
        class_names: number of each class's name.
    """

    texts: Sequence[str]
    teacher: Matrix
    image_texts: Tensor
    group_texts: Sequence[Sequence[int]]
    class_names: Sequence[int]

    def to(self, device: torch.device) -> CaptionData:
        """The same, with every tensor on this device."""
        return _moved(self, device)


@dataclass(frozen=True, kw_only=True)
class TuneData:
    """What is known of a domain of n images. There is no place for a label.

    Texts are int64 tokens, padded with 0 and read by the CLIP, or floating-point text embeds. Embeds of images and of
    their texts may be on disk (:class:`models.rows.Rows`), for a method that says it streams.

    Args:
        pseudo_labels: `z`, zero-shot class of each image, `(n,)` int64.
        class_texts: one template per class, `(classes, length or dim)`, or several,
            `(classes, templates, length or dim)`, whose unit features are averaged.
        image_texts: description of each image, `(n, length or dim)`; None when there are none.
        has_image_text: `(n,)` bool, False where an image has no description; None when all have.
        group_texts: descriptions of groups, `(groups, length or dim)`. At each step an image gets that of a random
            group of its pseudo-class (2.4); a class without groups does without.
        group_classes: pseudo-class of each group, `(groups,)` int64.
        independent_texts: who wrote the texts of images and groups saw the images otherwise than by `image_embeds`;
            what is read off the embeds (the describer `tags`) is no second opinion.
        image_embeds: cached image embeds, `(n, dim)`, for `train` prototypes and projections.
        centre: subtracted from image embeds before they are normalized, `(dim,)`; None for nothing.
        near_features: unit features by another tower, `(n, other dim)`, which say which images are near each other;
            None where `image_embeds` do. A zero row is near none.
        pixels: images of a batch, for `train` last_blocks and all.
        pairs: texts about pairs of images, for pc_clip.
        captions: the texts themselves, for clamp.

    Raises:
        ValueError: fewer than 2 classes, no image, labels out of range, or tensors that do not belong together.
    """

    pseudo_labels: Tensor
    class_texts: Tensor
    image_texts: Matrix | None = None
    has_image_text: Tensor | None = None
    group_texts: Matrix | None = None
    group_classes: Tensor | None = None
    independent_texts: bool = True
    image_embeds: Matrix | None = None
    centre: Tensor | None = None
    near_features: Matrix | None = None
    pixels: Pixels | None = None
    pairs: PairData | None = None
    captions: CaptionData | None = None

    def __post_init__(self) -> None:
        n_classes = len(self.class_texts)
        if n_classes < 2:
            raise ValueError(f"at least 2 classes are needed, class_texts has {n_classes}")
        for name in ("pseudo_labels", "group_classes"):
            labels = getattr(self, name)
            if labels is None:
                continue
            if labels.ndim != 1 or labels.dtype != torch.int64 or not len(labels):
                raise ValueError(f"{name} must be (n,) int64, n >= 1, got {tuple(labels.shape)} {labels.dtype}")
            if labels.min() < 0 or labels.max() >= n_classes:
                raise ValueError(f"{name} must be 0 to {n_classes - 1}, got {labels.min()} to {labels.max()}")
        if (self.group_texts is None) != (self.group_classes is None):
            raise ValueError("group_texts and group_classes belong together: give both or neither")
        n_groups = 0 if self.group_classes is None else len(self.group_classes)
        for name, dims, rows in (
            ("class_texts", (2, 3), n_classes),
            ("image_texts", (2,), len(self)),
            ("has_image_text", (1,), len(self)),
            ("group_texts", (2,), n_groups),
            ("image_embeds", (2,), len(self)),
            ("near_features", (2,), len(self)),
        ):
            tensor = getattr(self, name)
            if tensor is not None and (tensor.ndim not in dims or len(tensor) != rows):
                raise ValueError(f"{name} must have {rows} rows and {dims[0]} dimensions, got {tuple(tensor.shape)}")

    def __len__(self) -> int:
        return len(self.pseudo_labels)

    def to(self, device: torch.device) -> TuneData:
        """The same, with every tensor on this device."""
        return _moved(self, device)

    def take(self, rows: Tensor) -> TuneData:
        """Some of the images, `(m,)` int64, with what is known of them; texts about groups and classes stay.

        Raises:
            ValueError: there are pixels, pairs or captions, which are about images by their number.
        """
        if not self.pixels is self.pairs is self.captions is None:
            raise ValueError("pixels, pairs and captions are about images by their number; take the others only")
        names = ("pseudo_labels", "image_texts", "has_image_text", "image_embeds", "near_features")
        known: dict[str, Any] = {name: getattr(self, name) for name in names}
        taken: dict[str, Any] = {
            name: each.take(rows) if isinstance(each, Rows) else each[rows]
            for name, each in known.items()
            if each is not None
        }
        return replace(self, **taken)

    def in_memory(self) -> TuneData:
        """The same without anything on disk."""
        names = ("image_texts", "group_texts", "image_embeds", "near_features")
        known = {name: getattr(self, name) for name in names}
        captions = self.captions and replace(self.captions, teacher=in_memory(self.captions.teacher))
        loaded: dict[str, Any] = {name: in_memory(each) for name, each in known.items() if each is not None}
        return replace(self, **loaded, captions=captions)

    @property
    def image_features(self) -> Matrix:
        """Unit rows of the cached images, centred, `(n, dim)`; on disk where the embeds are.

        Raises:
            ValueError: there are no cached images.
        """
        if self.image_embeds is None:
            raise ValueError("cached image_embeds are needed, and there are none")
        centre = self.centre

        def features(embeds: Tensor) -> Tensor:
            embeds = at_least_float32(embeds)
            return unit(embeds if centre is None else embeds - centre)

        return through(self.image_embeds, features)

    @property
    def class_features(self) -> Tensor:
        """Unit text feature of each class, `(classes, dim)`, the mean direction over its templates.

        Raises:
            ValueError: class texts are tokens.
        """
        if not self.class_texts.is_floating_point():
            raise ValueError("class texts are needed as embeds, and are tokens")
        texts = unit(at_least_float32(self.class_texts))
        return unit(texts.mean(1)) if texts.ndim == 3 else texts


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """An adapted model, all of it detached.

    Args:
        prototypes: the classifier, unit rows, `(classes, dim)`.
        scale: `exp(logit_scale)` at the end.
        image_map: `(dim, dim)` after `train="projections"`, else None. Image features are
            `unit((embed - centre) @ image_map)`: multiply it into the projection, or keep it as a linear layer.
        text_map: the same for texts, `unit(embed @ text_map)`; None also when the text tower is frozen.
        clip: the tuned copy where towers were trained, else None.
        history: one dict per epoch, as `models.methods.training.train` returns it.
        assignments: soft classes of the domain's own images, `(n, classes)`, from a method that classifies them
            together, and so better than one by one with the prototypes; else None.
        adapter: file of a text tower that is no CLIP's, see `models.methods.method.Adapter`; else None.
        text_weight: of the images' texts beside zero-shot, from a method that asks what they are worth; else None.
    """

    prototypes: Tensor
    scale: float
    image_map: Tensor | None = None
    text_map: Tensor | None = None
    clip: nn.Module | None = None
    history: list[Stats] = field(default_factory=list)
    assignments: Matrix | None = None
    adapter: bytes | None = None
    text_weight: float | None = None
