"""PC-CLIP: a CLIP that reasons about differences (arXiv 2409.09721, TMLR 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from latteflow.models.methods.method import LAST_BLOCKS, Given, Method, Section, Sections
from latteflow.models.settings import Settings

if TYPE_CHECKING:
    from latteflow.models.methods.adaptation import Adapted


class PcClipSettings(Settings):
    """PC-CLIP: the text tower learns to say how two images differ. The image tower stays as it is."""

    train: Literal["blocks", "last_blocks", "projection"] | None = None
    """What learns. blocks: the blocks of the text tower, as in the paper. last_blocks: the last `n_blocks` of them.
    projection: a linear map at the end of the text tower, on cached features, in a minute or two on a laptop. Default:
    projection for the embedded model, else blocks."""
    n_blocks: int = Field(default=2, ge=1)
    """Blocks that `last_blocks` trains."""
    loss: Literal["contrastive", "squared_error"] = "contrastive"
    """Of texts and differences; the squared error is the paper's variant."""
    temperature: float = Field(default=1.0, gt=0, le=100)
    """Of the contrastive loss; fixed."""
    epochs: int = Field(default=20, ge=1)
    """Passes over the pairs."""
    batch_size: int = Field(default=512, ge=2)
    """Pairs in a step."""
    decay: float = Field(default=0.9, gt=0, le=1)
    """Factor of the learning rate after each epoch."""
    lr: float | None = Field(default=None, ge=0)
    """Learning rate of the first epoch. Default: what moves a weight as far in all as the paper's run does, whatever
    the number of pairs; for `projection` ten times as far, as there is one layer in place of twelve blocks."""
    averaging: float = Field(default=1.0, gt=0, le=1)
    """Share of the tuned weights in the result; the rest are those of the untouched CLIP. 1: all of it is tuned."""


def _trains_towers(sections: Sections, embedded: bool) -> bool:
    return (sections.of(PcClipSettings).train or ("projection" if embedded else "blocks")) != "projection"


def _made_from(sections: Sections) -> Mapping[str, Any]:
    return LAST_BLOCKS if sections.of(PcClipSettings).train == "last_blocks" else {}


def _adapt(given: Given) -> Adapted:
    from latteflow.models.methods.pc_clip.tuning import tune_pairs

    return tune_pairs(given.of(PcClipSettings), given.data, given.training, clip=given.clip, **given.options)


METHOD = Method(
    name="pc_clip",
    label="PC-CLIP",
    how="PC-CLIP, on texts about how two images differ",
    adapt=_adapt,
    reads="pairs",
    sections={"pc_clip": Section(PcClipSettings)},
    made_from=_made_from,
    trains_towers=_trains_towers,
    reads_for_others=True,
    streams=True,
)
