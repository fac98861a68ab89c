"""LatteCLIP: unsupervised tuning of CLIP on texts written by an LMM (arXiv 2410.08211, WACV 2025).

First the method's equations, one function each, then `latte_step`, which is one batch, then `tune`, the loop. Numbers
in brackets are sections of the method's description, docs/methods.md. Symbols: `v` image features, `mu` prototypes (one
unit vector per class, and the classifier), `z` zero-shot and `y` tuned pseudo-labels, `I`, `G`, `K` features of image,
group and class texts, `T` targets, `s = exp(logit_scale)`.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import ModelError
from models.losses import at_least_float32, clip_loss
from models.schedule import steps_per_epoch, warmup_cosine
from models.settings import LatteClipSettings

MARGIN_FLOOR = 1e-6
MAX_LOG_SCALE = math.log(100)

Stats = dict[str, float]

Pixels = Callable[[Tensor, torch.Generator | None], Tensor]
"""Image numbers `(b,)` to pixels `(b, 3, h, w)`, augmented by the generator's draws, or as for testing with None."""


# --- the equations ----------------------------------------------------------------------------------------------------


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length 1 (last dimension); a zero row stays zero."""
    return F.normalize(x, dim=-1)


def margins(texts: Tensor, prototypes: Tensor) -> Tensor:
    """How clearly each text is about one class: best minus second-best cosine, plus 1e-6 (4.4).

    It does not matter *which* class wins. Detached: the mixer's weights carry no gradient.

    Args:
        texts: unit rows, `(..., dim)`.
        prototypes: unit rows, `(classes, dim)`.

    Returns:
        `(...)`, positive, at most 2 + 1e-6; float32, or float64 for float64 texts.

    Raises:
        ValueError: fewer than 2 classes.
    """
    if len(prototypes) < 2:
        raise ValueError(f"margins need at least 2 classes, got {len(prototypes)}")
    cosines = at_least_float32(texts.detach()) @ at_least_float32(prototypes.detach()).T
    best, second = cosines.topk(2, dim=-1).values.unbind(-1)
    return best - second + MARGIN_FLOOR


def mix(
    texts: Tensor,
    weights: Tensor,
    *,
    axis: Literal["row", "column"] = "row",
    class_weights: Tensor | None = None,
) -> Tensor:
    """Weighted mean of a sample's class, image and group text (4.5).

    `m_i = (w_C K_i + w_I I_i + w_G G_i) / (w_C + w_I + w_G)`, a convex combination that is not normalized again.

    The two options reproduce the released code (4.6), whose class weight runs along the wrong axis: with
    `axis="column"` feature j of every sample's class text is multiplied by the class weight of *sample* j, which only
    works when the batch is as large as the embedding is wide; and its zero-shot branch multiplies by the tuned
    branch's class weights, passed as `class_weights`. The denominator is the same in all modes.

    Args:
        texts: class, image and group features, `(3, n, dim)`.
        weights: their weights, `(3, n)`, at least 0.
        axis: what the class weight runs along.
        class_weights: `(n,)`, used in the numerator instead of `weights[0]`.

    Returns:
        `(n, dim)`; a row whose weights are all 0 is 0.

    Raises:
        ValueError: column mode with a batch that is neither 1 nor `dim`.
    """
    n, dim = texts.shape[1:]
    own = weights[0] if class_weights is None else class_weights
    if axis == "column" and n not in (1, dim):
        raise ValueError(
            f"mixer_axis 'column' needs a batch as large as the embedding is wide ({dim}), got {n}: "
            "set batch_size to it and sample with replacement, or use 'row'"
        )
    class_part = texts[0] * (own[:, None] if axis == "row" else own[None, :])
    other_part = (weights[1:, :, None] * texts[1:]).sum(0)
    total = weights.sum(0)
    return (class_part + other_part) / torch.where(total > 0, total, 1)[:, None]


def targets(prototypes: Tensor, labels: Tensor, mixed: Tensor, alpha: float) -> Tensor:
    """What an image feature is pulled to: `T_i = (1 - alpha) mu_{l_i} + alpha m_i`, not normalized (4.7).

    Args:
        prototypes: unit rows, `(classes, dim)`; no gradient flows into them.
        labels: `(n,)` int64.
        mixed: `(n, dim)`.
        alpha: weight of the texts, 0 to 1.

    Returns:
        `(n, dim)`.
    """
    return (1 - alpha) * prototypes.detach()[labels] + alpha * mixed


def update_prototypes(prototypes: Tensor, labels: Tensor, contributions: Tensor) -> Tensor:
    """Each class's prototype becomes the unit mean of its targets (4.7).

    As every target already holds `(1 - alpha) mu`, this is a moving average with momentum `1 - alpha` per step.

    Args:
        prototypes: unit rows, `(classes, dim)`.
        labels: class of each contribution, `(m,)` int64; with both branches m is twice the batch.
        contributions: targets, `(m, dim)`.

    Returns:
        `(classes, dim)`, no gradient. Rows of classes without contributions are bit-identical to before.
    """
    sums = torch.zeros_like(prototypes).index_add_(0, labels, contributions.detach().to(prototypes.dtype))
    counts = torch.bincount(labels, minlength=len(prototypes))[:, None]
    return torch.where(counts > 0, unit(sums / counts.clamp(min=1)), prototypes.detach())


def classify(features: Tensor, prototypes: Tensor) -> Tensor:
    """Logits of the classifier, `100 <v, mu / |mu|>` (4.10); the label is their argmax.

    Args:
        features: unit rows, `(n, dim)`.
        prototypes: `(classes, dim)`.

    Returns:
        `(n, classes)`, float32 or wider.
    """
    return 100 * at_least_float32(features) @ unit(at_least_float32(prototypes)).T


# --- configuration ----------------------------------------------------------------------------------------------------


# --- one step ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one batch of n images gives.

    Args:
        losses: one scalar per branch, `zero_shot_loss` and `tuned_loss`; their sum is minimized.
        tuned_labels: `y`, `(n,)`.
        weights: normalized mixer weights (class, image, group) of the last branch, `(3, n)`.
        labels: class of each contribution to the prototypes, `(2n,)`, or `(n,)` with one branch.
        contributions: the targets of all branches, `(2n, dim)`.
    """

    losses: dict[str, Tensor]
    tuned_labels: Tensor
    weights: Tensor
    labels: Tensor
    contributions: Tensor


def latte_step(
    cfg: LatteClipSettings,
    image_features: Tensor,
    class_texts: Tensor,
    image_texts: Tensor,
    group_texts: Tensor,
    zero_shot_labels: Tensor,
    prototypes: Tensor,
    scale: Tensor | float,
    *,
    mixer_prototypes: Tensor | None = None,
    has_image_text: Tensor | None = None,
    has_group_text: Tensor | None = None,
) -> Step:
    """Losses and prototype contributions of one batch (4.2 to 4.7, pseudo-code 4.9).

    Args:
        cfg: alpha, mixer options, ablation switches.
        image_features: `v`, unit rows, `(n, dim)`.
        class_texts: `K`, unit row k is class k, `(classes, dim)`.
        image_texts, group_texts: `I` and `G`, unit rows, `(n, dim)`.
        zero_shot_labels: `z`, `(n,)` int64.
        prototypes: `mu`, unit rows, `(classes, dim)`.
        scale: `s = exp(logit_scale)`.
        mixer_prototypes: what margins are measured on; by default `prototypes`.
        has_image_text, has_group_text: `(n,)` bool, False where a text is missing: its weight is then 0. A sample
            left without any text has its prototype as target.
    """
    mu = prototypes.detach()
    tuned_labels = classify(image_features.detach(), mu).argmax(1)
    reference = mu if mixer_prototypes is None else mixer_prototypes
    class_margins = margins(class_texts, reference)
    others = []
    for texts, has_text, used in (
        (image_texts, has_image_text, cfg.use_image_texts),
        (group_texts, has_group_text, cfg.use_group_texts),
    ):
        weight = margins(texts, reference) * used
        others.append(weight if has_text is None else torch.where(has_text, weight, 0))

    branches = {"tuned": tuned_labels, "zero_shot": zero_shot_labels}
    losses, labels, contributions = {}, [], []
    for name, branch in branches.items():
        if cfg.labels not in ("both", name):
            continue
        weights = torch.stack([class_margins[branch] * cfg.use_class_texts, *others])
        shared = class_margins[tuned_labels] * cfg.use_class_texts if cfg.zero_shot_class_weight == "shared" else None
        # index_select, as the gradient of plain indexing is summed in no fixed order.
        texts = torch.stack([class_texts.index_select(0, branch), image_texts, group_texts])
        mixed = mix(texts, weights, axis=cfg.mixer_axis, class_weights=shared)
        total = weights.sum(0)
        mixed = torch.where(total[:, None] > 0, mixed, mu[branch])
        target = targets(mu, branch, mixed, cfg.alpha)
        losses[f"{name}_loss"] = clip_loss(image_features, target, scale)
        labels.append(branch)
        contributions.append(target)
    return Step(
        losses=losses,
        tuned_labels=tuned_labels,
        weights=weights / torch.where(total > 0, total, 1),
        labels=torch.cat(labels),
        contributions=torch.cat(contributions),
    )


# --- input and output -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TuneData:
    """What is known of a domain of n images. There is no place for a label.

    Texts are int64 tokens, padded with 0 and read by the CLIP, or floating-point text embeds.

    Args:
        pseudo_labels: `z`, zero-shot class of each image, `(n,)` int64.
        class_texts: one template per class, `(classes, length or dim)`, or several,
            `(classes, templates, length or dim)`, whose unit features are averaged.
        image_texts: description of each image, `(n, length or dim)`; None when there are none.
        has_image_text: `(n,)` bool, False where an image has no description; None when all have.
        group_texts: descriptions of groups, `(groups, length or dim)`. At each step an image gets that of a random
            group of its pseudo-class (2.4); a class without groups does without.
        group_classes: pseudo-class of each group, `(groups,)` int64.
        image_embeds: cached image embeds, `(n, dim)`, for `train` prototypes and projections.
        centre: subtracted from image embeds before they are normalized, `(dim,)`; None for nothing.
        pixels: images of a batch, for `train` last_blocks and all.

    Raises:
        ValueError: fewer than 2 classes, no image, labels out of range, or tensors that do not belong together.
    """

    pseudo_labels: Tensor
    class_texts: Tensor
    image_texts: Tensor | None = None
    has_image_text: Tensor | None = None
    group_texts: Tensor | None = None
    group_classes: Tensor | None = None
    image_embeds: Tensor | None = None
    centre: Tensor | None = None
    pixels: Pixels | None = None

    def __post_init__(self) -> None:
        n_classes = len(self.class_texts)
        if n_classes < 2:
            raise ValueError(f"LatteCLIP needs at least 2 classes, class_texts has {n_classes}")
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
        ):
            tensor = getattr(self, name)
            if tensor is not None and (tensor.ndim not in dims or len(tensor) != rows):
                raise ValueError(f"{name} must have {rows} rows and {dims[0]} dimensions, got {tuple(tensor.shape)}")

    def __len__(self) -> int:
        return len(self.pseudo_labels)

    def check(self, cfg: LatteClipSettings, has_clip: bool) -> None:
        """Raise ValueError when the configuration needs something that is not there."""
        if cfg.trains_towers and not (self.pixels and has_clip):
            raise ValueError(f"train={cfg.train!r} needs clip and pixels; with cached embeds use train='projections'")
        if not cfg.trains_towers and self.image_embeds is None:
            raise ValueError(f"train={cfg.train!r} needs image_embeds; on pixels use train='last_blocks' or 'all'")
        for name in ("class_texts", "image_texts", "group_texts"):
            texts = getattr(self, name)
            if texts is not None and not texts.is_floating_point() and not has_clip:
                raise ValueError(f"{name} are tokens and need clip to read them: give clip, or text embeds")
            if texts is not None and texts.is_floating_point() and cfg.trains_towers and cfg.trains_texts:
                raise ValueError(f"{name} are embeds, but the text tower trains: give tokens, or text_tower='frozen'")


@dataclass(frozen=True, kw_only=True)
class LatteClipResult:
    """What `tune` returns, all of it detached.

    Args:
        prototypes: the classifier, unit rows, `(classes, dim)`.
        image_map: `(dim, dim)` after `train="projections"`, else None. Image features are
            `unit((embed - centre) @ image_map)`: multiply it into the projection, or keep it as a linear layer.
        text_map: the same for texts, `unit(embed @ text_map)`; None also when the text tower is frozen.
        clip: the tuned copy after `last_blocks` and `all`, else None.
        scale: `exp(logit_scale)` at the end.
        history: one dict per epoch: epoch, step (done so far), lr (of the last step), scale, loss, tuned_loss,
            zero_shot_loss, agreement (share of y = z), class_weight, image_weight, group_weight (mean shares in the
            mixer), drift (mean over classes of 1 - cosine of a prototype and its start).
        assignments: soft classes of the domain's own images, `(n, classes)`, from a method that classifies them
            together, and so better than one by one with the prototypes; else None.
    """

    prototypes: Tensor
    image_map: Tensor | None
    text_map: Tensor | None
    clip: nn.Module | None
    scale: float
    history: list[Stats]
    assignments: Tensor | None = None


# --- what learns ------------------------------------------------------------------------------------------------------

# Where a tower keeps its blocks, and what follows them up to the embed.
_IMAGE_TAILS = {
    "visual.transformer.resblocks": ("visual.ln_post", "visual.proj"),
    "visual.trunk.blocks": ("visual.trunk.norm", "visual.trunk.conv_head", "visual.trunk.bn2", "visual.head"),
    "visual.blocks": ("visual.norm", "visual.conv_head", "visual.bn2", "image_projection"),
}
_TEXT_TAILS = {
    "transformer.resblocks": ("ln_final", "text_projection"),
    "text.transformer.resblocks": ("text.ln_final", "text.text_projection"),
    "text.layers": ("text_projection",),
}
_IMAGE_TOWERS = ("visual.", "image_projection")


def _last_blocks(clip: nn.Module, tails: Mapping[str, tuple[str, ...]], n_blocks: int) -> tuple[str, ...]:
    """Prefixes of the parameters of a tower's last blocks and of what follows them."""
    modules = dict(clip.named_modules())
    for path, tail in tails.items():
        if path in modules:
            names = [name for name, _ in modules[path].named_children()]
            return tuple(f"{path}.{name}." for name in names[-n_blocks:]) + tail
    raise ValueError(
        f"train='last_blocks' does not know where {type(clip).__name__} has its blocks (none of {', '.join(tails)}): "
        "use train='projections' or 'all', or freeze the text tower if it is the text tower's blocks that are missing"
    )


def _tower_parameters(clip: Any, cfg: LatteClipSettings) -> list[nn.Parameter]:
    """The parameters that `last_blocks` or `all` trains, without the scale."""
    named = {name: p for name, p in clip.named_parameters() if name != "logit_scale"}
    if not cfg.trains_texts:
        named = {name: p for name, p in named.items() if name.startswith(_IMAGE_TOWERS)}
    if cfg.train == "last_blocks":
        prefixes = _last_blocks(clip, _IMAGE_TAILS, cfg.n_blocks)
        if cfg.trains_texts:
            prefixes += _last_blocks(clip, _TEXT_TAILS, cfg.n_blocks)
        named = {name: p for name, p in named.items() if name.startswith(prefixes)}
    return list(named.values())


def _text_features(clip: Any, tokens: Tensor, *, trim: bool) -> Tensor:
    """Unit features `(m, dim)` of token rows `(m, length)`, read without their common padding if `trim`."""
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
    out = torch.func.functional_call(clip, lent, kwargs={"text": tokens[:, :length]})
    return unit(at_least_float32(out["text_features"] if isinstance(out, dict) else out[1]))


def _ignores_padding(clip: Any, tokens: Tensor) -> bool:
    """Whether the text tower gives the same features without the padding. CLIP's does, SigLIP's does not."""
    try:
        with torch.no_grad():
            cut, full = (_text_features(clip, tokens, trim=trim) for trim in (True, False))
    except RuntimeError:  # a tower that reads only rows of full length
        return False
    return bool(((cut * full).sum(1) > 0.9999).all())


class _Encoder(nn.Module):
    """Unit features of images and texts. Its parameters that require a gradient are what `tune` trains.

    Images come from cached embeds behind a learned map, or from the image tower. Texts that do not change are encoded
    once; the others once per step and distinct text.
    """

    def __init__(self, cfg: LatteClipSettings, data: TuneData, clip: Any, scale: float) -> None:
        super().__init__()
        device = data.pseudo_labels.device
        self.clip: Any = None if clip is None else copy.deepcopy(clip).eval().requires_grad_(False)
        self.trains_towers = cfg.trains_towers
        self.trains_texts = cfg.trains_texts
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bfloat16")
        self.trims: bool | None = None
        self.pixels = data.pixels
        self.centre = torch.zeros((), device=device) if data.centre is None else data.centre
        self.image_map: nn.Parameter | None = None
        self.text_map: nn.Parameter | None = None
        clip_scale = scale if self.clip is None else float(self.clip.logit_scale.detach().exp())
        log_scale = torch.tensor(math.log(cfg.first_scale(clip_scale)), device=device)
        self.log_scale = nn.Parameter(log_scale, requires_grad=cfg.train != "prototypes")
        if cfg.trains_towers:
            for parameter in _tower_parameters(self.clip, cfg):
                parameter.requires_grad_()
        elif data.image_embeds is not None:
            self.image_features = unit(at_least_float32(data.image_embeds) - self.centre)
            if cfg.train == "projections":
                identity = torch.eye(data.image_embeds.shape[1], dtype=self.image_features.dtype, device=device)
                self.image_map = nn.Parameter(identity)
                self.text_map = nn.Parameter(identity.clone()) if self.trains_texts else None

    def images(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        """Unit image features `(b, dim)` of image numbers `(b,)`."""
        if self.clip is not None and self.pixels is not None and self.trains_towers:
            with self.autocast:
                embeds = self.clip.encode_image(self.pixels(rows, generator), normalize=False)
            return unit(at_least_float32(embeds) - self.centre)
        features = self.image_features[rows]
        return features if self.image_map is None else unit(features @ self.image_map)

    def load_texts(self, kinds: list[Tensor]) -> list[Tensor]:
        """Take in all texts, tokens or embeds, as one table; returns the row of each text, kind by kind."""
        if self.trains_towers and self.trains_texts:
            width = max(texts.shape[1] for texts in kinds)
            self.table = torch.cat([F.pad(texts, (0, width - texts.shape[1])) for texts in kinds])
        else:
            with torch.no_grad():
                features = [self._fixed(texts) for texts in kinds]
            widths = {f.shape[1] for f in (features if self.trains_towers else [*features, self.image_features])}
            if len(widths) > 1:
                raise ValueError(f"embeds of images and texts are {sorted(widths)} wide: take them from one model")
            self.table = torch.cat(features)
        rows = torch.arange(len(self.table), device=self.table.device)
        if self.trains_texts:
            self.table, rows = self.table.unique(dim=0, return_inverse=True)
        return list(rows.split([len(texts) for texts in kinds]))

    def texts(self, rows: Tensor) -> Tensor:
        """Unit text features `(m, dim)` of table rows `(m,)`, each distinct one computed once."""
        if not self.trains_texts:
            return self.table[rows]
        distinct, inverse = rows.unique(return_inverse=True)
        source = self.table[distinct]
        features = self._read(source) if self.text_map is None else unit(source @ self.text_map)
        return features.index_select(0, inverse)

    def _fixed(self, texts: Tensor) -> Tensor:
        if texts.is_floating_point():
            return unit(at_least_float32(texts))
        distinct, inverse = texts.unique(dim=0, return_inverse=True)
        return torch.cat([self._read(chunk) for chunk in distinct.split(256)])[inverse]

    def _read(self, tokens: Tensor) -> Tensor:
        if self.trims is None:
            shortest = int(tokens.count_nonzero(1).argmin())
            self.trims = _ignores_padding(self.clip, tokens[shortest : shortest + 1])
        with self.autocast:
            return _text_features(self.clip, tokens, trim=self.trims)

    def frozen(self) -> list[Tensor]:
        """The tensors of the CLIP that must stay as they are."""
        if self.clip is None:
            return []
        return [t for t in (*self.clip.parameters(), *self.clip.buffers()) if not t.requires_grad]

    def result(self, prototypes: Tensor, history: list[Stats]) -> LatteClipResult:
        tuned = self.clip if self.trains_towers else None
        if tuned is not None:
            tuned.requires_grad_(False).logit_scale.fill_(float(self.log_scale.detach()))
        return LatteClipResult(
            prototypes=prototypes,
            image_map=None if self.image_map is None else self.image_map.detach(),
            text_map=None if self.text_map is None else self.text_map.detach(),
            clip=tuned,
            scale=float(self.log_scale.detach().exp()),
            history=history,
        )


def _digest(tensors: list[Tensor]) -> int:
    digest = 0
    for t in tensors:
        digest = zlib.crc32(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, digest)
    return digest


# --- the loop ---------------------------------------------------------------------------------------------------------


class NonFiniteLossError(ModelError):
    """A loss became NaN or infinite; `step` and `images` say where."""

    def __init__(self, step: int, images: Tensor, losses: dict[str, Tensor]) -> None:
        values = ", ".join(f"{name} {float(value.detach())}" for name, value in losses.items())
        super().__init__(
            f"step {step}: {values}; first images of the batch {images[:8].tolist()}: "
            "lower lr, and look for NaN in the embeds"
        )
        self.step, self.images = step, images.tolist()


def tune(
    cfg: LatteClipSettings,
    data: TuneData,
    *,
    seed: int = 0,
    clip: Any = None,
    scale: float = 100.0,
    on_epoch: Callable[[int, Stats], None] | None = None,
) -> LatteClipResult:
    """Tune a classifier on unlabelled images and the texts written about them (section 4).

    Each text is encoded once where the text tower is frozen; otherwise each distinct text of a batch once, unpadded.

    Args:
        cfg: the configuration.
        data: the domain.
        seed: of batches, group texts and augmentation.
        clip: module with `encode_image(pixels, normalize=False)`, `encode_text(tokens, normalize=False)` and
            `logit_scale`, as open_clip's. It is not changed. Not needed when texts are embeds and images cached.
        scale: `exp(logit_scale)` of the CLIP that cached embeds are from, where `clip` is not given.
        on_epoch: called with the epoch, from 0, and its entry of the history.

    Returns:
        The result. The same arguments give the same bits on the same machine; global random state is not used.

    Raises:
        ValueError: the configuration needs something that is not there.
        NonFiniteLossError: a loss is not finite.
    """
    data.check(cfg, has_clip=clip is not None)
    device, n, n_classes = data.pseudo_labels.device, len(data), len(data.class_texts)
    encoder = _Encoder(cfg, data, clip, scale)
    frozen = encoder.frozen()
    frozen_digest = _digest(frozen)

    templates = data.class_texts if data.class_texts.ndim == 3 else data.class_texts[:, None]
    given = [texts for texts in (templates.flatten(0, 1), data.image_texts, data.group_texts) if texts is not None]
    rows = iter(encoder.load_texts(given))
    class_rows = next(rows)
    # A missing text stands for row 0, with a mask that gives it no weight.
    image_rows = class_rows.new_zeros(n) if data.image_texts is None else next(rows)
    group_rows = class_rows.new_zeros(1) if data.group_texts is None else next(rows)
    has_image_text = data.has_image_text
    if has_image_text is None:
        has_image_text = torch.full((n,), data.image_texts is not None, device=device)
    draw_groups = _group_sampler(data.group_classes, n_classes, device)

    def text_features(images: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of all classes, `(classes, dim)`, and of a batch's image and group texts, `(b, dim)` each."""
        found = encoder.texts(torch.cat([class_rows, image_rows[images], group_rows[groups]]))
        by_template, image_texts, group_texts = found.split([len(class_rows), len(images), len(groups)])
        return unit(by_template.unflatten(0, templates.shape[:2]).mean(1)), image_texts, group_texts

    with torch.no_grad():
        first_prototypes = prototypes = text_features(class_rows[:0], class_rows[:0])[0]

    trained = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = _adamw(trained, cfg) if trained else None
    batch_draws, group_draws, view_draws = (torch.Generator().manual_seed(3 * seed + i) for i in range(3))
    n_steps = steps_per_epoch(n, cfg.batch_size)
    n_epochs = cfg.n_epochs(n)
    history: list[Stats] = []
    for epoch in range(n_epochs):
        epoch_prototypes = prototypes
        seen: list[Stats] = []
        for step, drawn in enumerate(batches(cfg, n, n_steps, batch_draws), start=epoch * n_steps):
            images = drawn.to(device)
            z = data.pseudo_labels[images]
            groups, has_group_text = draw_groups(z, group_draws)
            with torch.set_grad_enabled(optimizer is not None):
                batch = latte_step(
                    cfg,
                    encoder.images(images, view_draws if cfg.augment else None),
                    *text_features(images, groups),
                    z,
                    prototypes,
                    encoder.log_scale.exp(),
                    mixer_prototypes=epoch_prototypes if cfg.mixer_prototypes == "epoch" else prototypes,
                    has_image_text=has_image_text[images],
                    has_group_text=has_group_text,
                )
                loss = torch.stack(list(batch.losses.values())).sum()
            if not loss.isfinite():
                raise NonFiniteLossError(step, images, batch.losses)
            prototypes = update_prototypes(prototypes, batch.labels, batch.contributions)
            lr = warmup_cosine(step, cfg.peak_lr, cfg.warmup, n_epochs * n_steps)
            if optimizer is not None:
                _descend(optimizer, loss, lr)
                encoder.log_scale.data.clamp_(0, MAX_LOG_SCALE)
            seen.append(_step_stats(batch, z) | {"loss": float(loss.detach())})
        stats = {key: sum(s[key] for s in seen) / len(seen) for key in seen[0]}
        stats |= {"epoch": epoch, "step": step + 1, "lr": lr, "scale": float(encoder.log_scale.detach().exp())}
        stats["drift"] = float((1 - (first_prototypes * prototypes).sum(1)).mean())
        history.append(stats)
        if on_epoch is not None:
            on_epoch(epoch, stats)

    if _digest(frozen) != frozen_digest:
        raise AssertionError("a frozen tensor of the CLIP changed: one of its towers modifies its own state")
    return encoder.result(prototypes, history)


def batches(cfg: LatteClipSettings, n: int, n_steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """The image numbers of each step of an epoch."""
    if cfg.sampling == "with_replacement":
        for _ in range(n_steps):
            yield torch.randint(n, (cfg.batch_size,), generator=generator)
    else:
        yield from torch.randperm(n, generator=generator).tensor_split(n_steps)


def _group_sampler(
    classes: Tensor | None, n_classes: int, device: torch.device
) -> Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]:
    """Draws, for each label of a batch, the row of a uniformly random group of that class, and says if there is one."""
    classes = torch.zeros(0, dtype=torch.int64, device=device) if classes is None else classes
    by_class = torch.cat(
        [classes.argsort(stable=True), classes.new_zeros(1)]
    )  # one more, for a last class without group
    count = torch.bincount(classes, minlength=n_classes)
    first = count.cumsum(0) - count

    def draw(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        n_groups = count[labels]
        position = (torch.rand(len(labels), generator=generator, dtype=torch.float64).to(device) * n_groups).long()
        return by_class[first[labels] + position], n_groups > 0

    return draw


def _adamw(parameters: list[nn.Parameter], cfg: LatteClipSettings) -> torch.optim.AdamW:
    """AdamW that decays matrices only (3.2)."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.peak_lr, betas=cfg.betas, eps=cfg.eps, fused=True)


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _step_stats(batch: Step, zero_shot_labels: Tensor) -> Stats:
    class_weight, image_weight, group_weight = batch.weights.mean(1).tolist()
    return {
        **{name: float(loss.detach()) for name, loss in batch.losses.items()},
        "agreement": float((batch.tuned_labels == zero_shot_labels).float().mean()),
        "class_weight": class_weight,
        "image_weight": image_weight,
        "group_weight": group_weight,
    }
