"""LatteCLIP: unsupervised tuning of CLIP on texts written by an LMM (arXiv 2410.08211, WACV 2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from latteflow.models.methods.method import LAST_BLOCKS, Given, Method, Section, Sections
from latteflow.models.schedule import steps_per_epoch
from latteflow.models.settings import Settings

if TYPE_CHECKING:
    from latteflow.models.methods.adaptation import Adapted

DEFAULT_STEPS = 640
OF_TEXTS = {
    "alpha", "labels", "use_class_texts", "use_image_texts", "use_group_texts", "mixer_axis", "zero_shot_class_weight",
    "mixer_prototypes", "texts_from",
}  # fmt: skip
"""LatteCLIP's settings that no baseline has: what its targets are made of."""
Momentum = Annotated[float, Field(ge=0, lt=1)]


class LatteClipSettings(Settings):
    """Every choice LatteCLIP leaves. Where a default is not the paper's, its text says what the paper has."""

    train: Literal["prototypes", "projections", "last_blocks", "all"] = "projections"
    """What the loss trains besides the prototypes. prototypes: nothing. projections: a linear map at the end of each
    tower, on cached features. last_blocks: each tower's last `n_blocks` and projection. all: as in the paper."""
    text_tower: Literal["trainable", "frozen"] | None = None
    """Whether the text side learns as well; its gradient is `alpha` times the image side's. Default: frozen for
    projections (a text map learns by heart what the image map should), else trainable, as in the paper."""
    n_blocks: int = Field(default=2, ge=1)
    """Blocks of each tower that `last_blocks` trains."""
    alpha: float = Field(default=0.01, ge=0, le=1)
    """Share of the texts in a target, and so how far a prototype moves per step."""
    texts_from: Literal["clip", "pc_clip", "clamp"] = "clip"
    """Who reads the texts: the untouched CLIP, or the text tower that pc_clip or clamp trained with the same seed,
    which then has to be in `method` as well."""
    labels: Literal["both", "zero_shot", "tuned"] = "both"
    """Pseudo-labels in use: those of the untouched CLIP, those of the nearest prototype, or both."""
    use_class_texts: bool = True
    """Class descriptions enter the mixer."""
    use_image_texts: bool = True
    """Image descriptions enter the mixer."""
    use_group_texts: bool = True
    """Group descriptions enter the mixer."""
    mixer_axis: Literal["row", "column"] = "row"
    """What the mixer's class weight runs along: samples, or, as in the released code, features (batch_size = width)."""
    zero_shot_class_weight: Literal["own", "shared"] = "own"
    """Class weight of the zero-shot branch: its own, or, as in the released code, the tuned branch's."""
    mixer_prototypes: Literal["epoch", "live"] = "epoch"
    """Prototypes that the mixer's weights are measured on: those at the epoch's start, or the latest."""
    batch_size: int = Field(default=128, ge=1)
    """Images per step; the paper has 512."""
    sampling: Literal["with_replacement", "without_replacement"] = "without_replacement"
    """without_replacement: each image once per epoch. with_replacement: full batches with repeats, as in the paper."""
    step_multiple: int = Field(default=1, ge=1)
    """Steps of an epoch are rounded up to a multiple of this; the paper's are of its loader's 3 or 4 workers."""
    epochs: int | None = Field(default=None, ge=1)
    """Passes over the images. Default: as few as make 640 steps, like the paper's 585 to 2115: by then texts have
    replaced all but `(1 - alpha) ** steps`, 0.2 percent, of the first prototypes."""
    scale: float | None = Field(default=None, gt=0, le=100)
    """Where the loss's `exp(logit_scale)` starts. Default: 10 for projections, else the CLIP's own. At a low scale no
    image is ever settled, so that wrong pseudo-labels average out where a high one would learn them by heart."""
    lr: float | None = Field(default=None, ge=0)
    """Highest learning rate. Default: 1e-5 for projections, else the paper's 1e-7."""
    warmup: int = Field(default=10, ge=0)
    """Steps of linear warm-up; the paper has about one epoch."""
    weight_decay: float = Field(default=0.2, ge=0)
    """AdamW's decay of matrices. Vectors and the scale have none."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.98)
    """AdamW's averaging factors."""
    eps: float = Field(default=1e-6, gt=0)
    """AdamW's epsilon."""
    augment: bool = True
    """Train on augmented views; only where pixels are used."""

    @property
    def peak_lr(self) -> float:
        """The highest learning rate of a run."""
        if self.train == "prototypes":
            return 0.0
        return self.lr if self.lr is not None else 1e-5 if self.train == "projections" else 1e-7

    def n_epochs(self, n_images: int) -> int:
        """Epochs of a run over so many images."""
        return self.epochs or math.ceil(DEFAULT_STEPS / self.n_steps(n_images))

    def n_steps(self, n_images: int) -> int:
        """Steps of an epoch over so many images."""
        return steps_per_epoch(n_images, self.batch_size, self.step_multiple)

    def first_scale(self, clip_scale: float) -> float:
        """The loss's scale at the start of a run with a CLIP of that scale."""
        return self.scale or (10.0 if self.train == "projections" else clip_scale)

    @property
    def trains_texts(self) -> bool:
        """Whether the text side learns."""
        default = "frozen" if self.train == "projections" else "trainable"
        return self.train != "prototypes" and (self.text_tower or default) == "trainable"

    @property
    def trains_towers(self) -> bool:
        """Whether images and texts go through the towers at every step."""
        return self.train in ("last_blocks", "all")

    @model_validator(mode="after")
    def _has_text(self) -> LatteClipSettings:
        if not (self.use_class_texts or self.use_image_texts or self.use_group_texts):
            raise ValueError("the mixer has no text: turn on use_class_texts, use_image_texts or use_group_texts")
        return self


def trains_towers(sections: Sections, embedded: bool) -> bool:
    """Of every method with this section whose loss can train towers."""
    return sections.of(LatteClipSettings).trains_towers


def made_from(sections: Sections) -> Mapping[str, Any]:
    """Of the same methods."""
    return LAST_BLOCKS if sections.of(LatteClipSettings).train == "last_blocks" else {}


def _adapt(given: Given) -> Adapted:
    from latteflow.models.methods.latteclip.tuning import tune

    return tune(given.of(LatteClipSettings), given.data, given.training, clip=given.clip, **given.options)


METHOD = Method(
    name="latteclip",
    label="LatteCLIP",
    how="LatteCLIP (Cao et al. 2025, arXiv 2410.08211)",
    adapt=_adapt,
    reads="texts",
    sections={"latteclip": Section(LatteClipSettings)},
    made_from=made_from,
    trains_towers=trains_towers,
    streams=True,
)
