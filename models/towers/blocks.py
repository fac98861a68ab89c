"""What is known of CLIP's towers from outside: where their blocks are, and how they read texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from latteflow.models.vectors import at_least_float32, unit

# Where a tower keeps its blocks, and what follows them up to the embed. timm's ConvNeXt, FastViT and Swin have stages.
_TIMM_ENDS = ("norm", "fc_norm", "attn_pool", "final_conv", "conv_head", "bn2", "head_drop", "head")
_TIMM_TAIL = (*(f"visual.trunk.{name}" for name in _TIMM_ENDS), "visual.head")
IMAGE_TAILS = {
    "visual.transformer.resblocks": (
        "visual.attn_pool",
        "visual.attn_pool_contrastive",
        "visual.ln_post",
        "visual.proj",
    ),
    "visual.trunk.blocks": _TIMM_TAIL,
    "visual.trunk.stages": _TIMM_TAIL,
    "visual.trunk.layers": _TIMM_TAIL,
    "visual.layer4": ("visual.attnpool",),
    "visual.blocks": ("visual.norm", "visual.conv_head", "visual.bn2", "image_projection"),
}
TEXT_TAILS = {
    "transformer.resblocks": ("ln_final", "text_projection"),
    "text.transformer.resblocks": ("text.ln_final", "text.text_projection"),
    "text.layers": ("text_projection",),
    # of transformers: BERT's kind, M2M100's, T5's
    "text.transformer.encoder.layer": ("text.transformer.pooler", "text.proj"),
    "text.transformer.layers": ("text.transformer.layer_norm", "text.proj"),
    "text.transformer.block": ("text.transformer.final_layer_norm", "text.proj"),
}
IMAGE_TOWERS = ("visual.", "image_projection")
NO_TOWERS = ("logit_scale", "text_decoder.")
"""What no embed comes from: CoCa has a decoder besides its towers."""


def last_blocks(clip: nn.Module, tails: Mapping[str, tuple[str, ...]], n_blocks: int) -> frozenset[str]:
    """Names of the parameters of a tower's last blocks and of what follows them.

    Args:
        clip: the whole model.
        tails: of the tower, IMAGE_TAILS or TEXT_TAILS.
        n_blocks: how many blocks, of a tower in stages how many of these; of a ResNet at most those of the last stage.

    Raises:
        ValueError: the tower's blocks are at none of the known places.
    """
    modules = dict(clip.named_modules())
    for path, tail in tails.items():
        if path in modules:
            last = [f"{path}.{name}" for name, _ in modules[path].named_children()][-n_blocks:]
            places = (*last, *tail)
            # Whole names: `visual.trunk.norm` is not `visual.trunk.norm_pre`, which comes before the blocks.
            return frozenset(
                name
                for name, _ in clip.named_parameters()
                if any(name == place or name.startswith(f"{place}.") for place in places)
            )
    raise ValueError(
        f"train='last_blocks' does not know where {type(clip).__name__} has its blocks (none of {', '.join(tails)}): "
        "use train='projections' or 'all', or freeze the text tower if it is the text tower's blocks that are missing"
    )


def text_blocks(clip: nn.Module, n_blocks: int | None = None) -> list[nn.Parameter]:
    """The parameters of the text tower's blocks, or of its last ones; none of what comes before and after them.

    Raises:
        ValueError: the blocks are at none of the known places.
    """
    modules = dict(clip.named_modules())
    for path in TEXT_TAILS:
        if path in modules:
            blocks = list(modules[path].children())
            return [p for block in blocks[-(n_blocks or len(blocks)) :] for p in block.parameters()]
    raise ValueError(
        f"it is not known where {type(clip).__name__} has the blocks of its text tower (none of "
        f"{', '.join(TEXT_TAILS)}): use train='projection'"
    )


def text_features(clip: Any, tokens: Tensor, *, trim: bool) -> Tensor:
    """Unit features ``(m, dim)`` of token rows ``(m, length)``, read without their common padding if ``trim``."""
    if not trim:
        return unit(at_least_float32(clip.encode_text(tokens, normalize=False)))
    used = tokens.any(0).nonzero()
    length = int(used.max()) + 1 if len(used) else 1
    # open_clip's towers use all their positions and mask whatever the length, so they are lent only the first ones.
    prefix, tower = ("text.", clip.text) if hasattr(clip, "text") else ("", clip)
    positions, mask = (getattr(tower, name, None) for name in ("positional_embedding", "attn_mask"))
    lent = {} if positions is None else {f"{prefix}positional_embedding": positions[:length]}
    lent |= {} if mask is None else {f"{prefix}attn_mask": mask[:length, :length]}
    if not lent:
        return unit(at_least_float32(clip.encode_text(tokens[:, :length], normalize=False)))
    lent = {f"clip.{name}": tensor for name, tensor in lent.items()}
    return unit(at_least_float32(torch.func.functional_call(_TextTower(clip), lent, (tokens[:, :length],))))


class _TextTower(nn.Module):
    """`encode_text` as a module's forward: that of the whole model differs from one kind of CLIP to the next."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, tokens: Tensor) -> Tensor:
        return self.clip.encode_text(tokens, normalize=False)


def ignores_padding(clip: Any, tokens: Tensor) -> bool:
    """Whether the text tower gives the same features without the padding. CLIP's does, SigLIP's does not."""
    try:
        with torch.no_grad():
            cut, full = (text_features(clip, tokens, trim=trim) for trim in (True, False))
    except RuntimeError:  # a tower that reads only rows of full length
        return False
    return bool(((cut * full).sum(1) > 0.9999).all())


class TextReader:
    """A text tower that reads rows without their padding where that changes nothing, which is tried once."""

    def __init__(self, clip: Any) -> None:
        self.clip = clip
        self.trims: bool | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        """Token rows ``(m, length)`` -> unit features ``(m, dim)``."""
        if self.trims is None:
            shortest = int(tokens.count_nonzero(1).argmin())
            self.trims = ignores_padding(self.clip, tokens[shortest : shortest + 1])
        return text_features(self.clip, tokens, trim=self.trims)
