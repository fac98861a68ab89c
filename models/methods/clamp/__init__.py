"""CLAMP: a language model as the text tower of a CLIP (arXiv 2312.01629; docs/methods.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from latteflow.models.methods.method import Adapter, Given, Method, Section, Sections
from latteflow.models.settings import Settings

if TYPE_CHECKING:
    import numpy as np

    from latteflow.models.methods.adaptation import Adapted

VERSION = 2
"""Of what a tower is given; raised when it changes."""
Momentum = Annotated[float, Field(ge=0, lt=1)]


class ClampSettings(Settings):
    """CLAMP: a language model as the text tower. Defaults that are not the paper's are for small models and runs."""

    lm: str | None = None
    """``embedded`` (Gemma 3 270M from packages; see docs/methods.md for its terms), the name of a causal language model
    on the model hub, or the path of a model folder. There is no default."""
    revision: str | None = None
    """Commit or tag of the weights."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the language model; what is learned is always float32."""
    prompts: int = Field(default=24, ge=1, le=256)
    """Learned vectors after each text."""
    prompt_mask: Literal["bidirectional", "causal", "isolated"] = "bidirectional"
    """What a prompt sees besides the text: all prompts, as in the paper; those up to itself; none."""
    pool_heads: int = Field(default=8, ge=1)
    """Attention heads of the pool; they divide the CLIP's width."""
    wrapper: Literal["attributes", "single"] = "attributes"
    """The sentence around a text: the paper's, which has it twice, or one that has it once, for long descriptions."""
    max_tokens: int = Field(default=48, ge=1)
    """Tokens of a text that are read; longer ones are cut."""
    lora_rank: int = Field(default=0, ge=0)
    """Rank of the updates of the language model's attention; the paper has 16. 0: the language model stays as it is,
    its reading of each text is kept, and training is several times faster."""
    lora_alpha: int = Field(default=16, ge=1)
    """The updates count `alpha / rank` times."""
    lora_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of an update's inputs that a step of training leaves out."""
    lora_targets: list[str] = Field(default=["q_proj", "k_proj", "v_proj", "o_proj"], min_length=1)
    """Names of the matrices with updates."""
    distill: float = Field(default=1.0, ge=0)
    """Weight of the distillation from the CLIP's own text tower; the contrastive loss has 1."""
    distill_scale: Literal["teacher", "native"] = "teacher"
    """On the student's similarities in the distillation: the teacher's logit scale, or its own, as in open_clip."""
    reduction: Literal["mean", "sum"] = "mean"
    """Losses as means over the batch and the two directions, or sums as the paper writes them."""
    group_share: float = Field(default=0.3, ge=0, le=1)
    """How often an image's text is that of a group it is in."""
    class_share: float = Field(default=0.2, ge=0, le=1)
    """How often it is the class of the image's zero-shot pseudo-label, by its name."""
    batch_size: int = Field(default=256, ge=2)
    """Pairs in a step; a pair is learned from the others of its batch."""
    steps: int = Field(default=1000, ge=1)
    """Steps of a run."""
    pool_steps: int = Field(default=0, ge=0)
    """Steps before these in which the pool alone learns, from states at the first prompts: each text goes through the
    language model once, so they cost next to nothing. The paper has none."""
    lr: float = Field(default=5e-4, ge=0)
    """Highest learning rate of prompts and pool."""
    lora_lr: float = Field(default=1e-4, ge=0)
    """Highest learning rate of LoRA."""
    warmup: float = Field(default=0.02, ge=0, le=1)
    """Share of the steps with a rising learning rate."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW's decay of matrices. Prompts, query, norms, biases and the scale have none."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.98)
    """AdamW's averaging factors."""
    eps: float = Field(default=1e-6, gt=0)
    """AdamW's epsilon."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Longest gradient; longer ones are scaled down."""
    cache_gb: float = Field(default=2.0, ge=0)
    """Memory for what the language model made of texts, without LoRA. Texts beyond it are read again at each step."""


def _made_from(sections: Sections) -> Mapping[str, Any]:
    from latteflow.models.methods.clamp import lm

    return {"language_model": lm.identity(sections.of(ClampSettings)), "version": VERSION}


def _mistake(sections: Sections) -> str:
    if sections.of(ClampSettings).lm is not None:
        return ""
    return (
        "clamp needs a language model: `clamp: {lm: NAME}` with a causal one from the model hub, a folder, "
        "or `embedded`"
    )


def _adapt(given: Given) -> Adapted:
    from latteflow.models.methods.clamp.tuning import tune_clamp

    return tune_clamp(given.of(ClampSettings), given)


def _read(adapter: bytes, sections: Sections) -> Callable[[Sequence[str]], np.ndarray]:
    import torch

    from latteflow.models.methods.clamp.adapter import unpack

    tower = unpack(adapter, sections.of(ClampSettings).lm, "cuda" if torch.cuda.is_available() else "cpu")
    return lambda texts: tower.text_features(texts).cpu().numpy()


METHOD = Method(
    name="clamp",
    label="CLAMP",
    how="CLAMP (arXiv 2312.01629): the class names were read by a language model",
    adapt=_adapt,
    reads="captions",
    # The name and revision of the language model are in its identity; its cache shapes nothing.
    sections={"clamp": Section(ClampSettings, unread=("lm", "revision", "cache_gb"))},
    made_from=_made_from,
    reads_for_others=True,
    adapter=Adapter(
        _read, "`clamp.safetensors` is the adapter of CLAMP's text tower; its language model is not in the folder."
    ),
    mistake=_mistake,
    streams=True,
)
