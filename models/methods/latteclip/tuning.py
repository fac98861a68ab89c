"""LatteCLIP: unsupervised tuning of CLIP on texts written by an LMM (arXiv 2410.08211, WACV 2025).

First the method's equations, one function each, then `latte_step`, which is one batch, then `LatteClip`, which the
training engine runs. Numbers in brackets are sections of the method's description, docs/methods.md. Symbols: `v` image
features, `mu` prototypes (one unit vector per class, and the classifier), `z` zero-shot and `y` tuned pseudo-labels,
`I`, `G`, `K` features of image, group and class texts, `T` targets, `s = exp(logit_scale)`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latteflow.models.methods.adaptation import Adapted, TuneData
from latteflow.models.methods.latteclip import LatteClipSettings
from latteflow.models.methods.latteclip.vocabulary import Vocabulary, vocabulary
from latteflow.models.methods.losses import clip_loss
from latteflow.models.methods.training import Batch, Checkpoint, Stats, Trainable, train
from latteflow.models.rows import Matrix, Rows, in_memory, through, together
from latteflow.models.schedule import warmup_cosine
from latteflow.models.settings import TrainingSettings
from latteflow.models.towers.blocks import IMAGE_TAILS, IMAGE_TOWERS, NO_TOWERS, TEXT_TAILS, TextReader, last_blocks
from latteflow.models.vectors import at_least_float32, unit

MARGIN_FLOOR = 1e-6
MAX_LOG_SCALE = math.log(100)


# --- the equations ----------------------------------------------------------------------------------------------------


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


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _About:
    """What the loss needs of a batch of b images besides the features of images and texts.

    Args:
        images: image numbers, `(b,)`.
        zero_shot_labels: `z`, `(b,)`.
        texts: row of the batch's text features, or of the table where texts are fixed, for each class sentence, then
            for the image text and the group text of each image.
        has_group_text: `(b,)` bool.
    """

    images: Tensor
    zero_shot_labels: Tensor
    texts: Tensor
    has_group_text: Tensor


class LatteClip(Trainable):
    """LatteCLIP in training (section 4).

    Images come from cached embeds behind a learned map, or from the image tower. Texts that do not change are encoded
    once; the others once for each step and distinct text, without padding.

    Args:
        cfg: the configuration.
        data: the domain.
        seed: of batches, group texts and augmentation.
        clip: module with `encode_image(pixels, normalize=False)`, `encode_text(tokens, normalize=False)` and
            `logit_scale`, as open_clip's. It is not changed. Not needed when texts are embeds and images cached.
        scale: `exp(logit_scale)` of the CLIP that cached embeds are from, where `clip` is not given.

    Raises:
        ValueError: the configuration needs something that is not there.
    """

    prototypes: Tensor
    epoch_prototypes: Tensor

    def __init__(
        self, cfg: LatteClipSettings, data: TuneData, *, seed: int = 0, clip: Any = None, scale: float = 100.0
    ) -> None:
        super().__init__()
        _check(cfg, data, has_clip=clip is not None)
        self.cfg, self.data, self.seed = cfg, data, seed
        self.device = data.pseudo_labels.device
        self.steps_per_epoch = cfg.n_steps(len(data))
        self.n_steps = cfg.n_epochs(len(data)) * self.steps_per_epoch
        self.clip: Any = None if clip is None else _own(clip, tower_parameters(clip, cfg) if cfg.trains_towers else [])
        self.read = TextReader(self.clip)
        clip_scale = scale if clip is None else float(clip.logit_scale.detach().exp())
        log_scale = torch.tensor(math.log(cfg.first_scale(clip_scale)), device=self.device)
        self.log_scale = nn.Parameter(log_scale, requires_grad=cfg.train != "prototypes")
        self.image_map: nn.Parameter | None = None
        self.text_map: nn.Parameter | None = None
        if cfg.trains_towers:
            for parameter in tower_parameters(self.clip, cfg):
                parameter.requires_grad_()
        else:
            self.image_features = data.image_features
            if cfg.train == "projections":
                identity = torch.eye(self.image_features.shape[1], dtype=self.image_features.dtype, device=self.device)
                self.image_map = nn.Parameter(identity)
                self.text_map = nn.Parameter(identity.clone()) if cfg.trains_texts else None
        self._take_texts()
        with torch.no_grad():
            own = self.table[self.class_rows]
            self.first_prototypes = self._class_features(self.encode("texts", own) if cfg.trains_texts else own)
        self.register_buffer("prototypes", self.first_prototypes.clone())
        self.register_buffer("epoch_prototypes", self.first_prototypes.clone())

    def _take_texts(self) -> None:
        """All texts, tokens or embeds, as one table, and the row of each text in it."""
        data = self.data
        templates = data.class_texts if data.class_texts.ndim == 3 else data.class_texts[:, None]
        self.n_templates = templates.shape[1]
        kinds = [t for t in (templates.flatten(0, 1), data.image_texts, data.group_texts) if t is not None]
        self.table: Matrix
        self.vocabulary: Vocabulary | None = None
        if self.cfg.trains_towers and self.cfg.trains_texts:
            tokens = [in_memory(texts) for texts in kinds]
            width = max(texts.shape[1] for texts in tokens)
            table = torch.cat([F.pad(texts, (0, width - texts.shape[1])) for texts in tokens])
            self.vocabulary = vocabulary(self.clip, table)
            self.table = table if self.vocabulary is None else self.vocabulary.numbers(table)
        else:
            with torch.no_grad():
                features = [self._fixed(texts) for texts in kinds]
            widths = {f.shape[1] for f in (features if self.cfg.trains_towers else [*features, self.image_features])}
            if len(widths) > 1:
                raise ValueError(f"embeds of images and texts are {sorted(widths)} wide: take them from one model")
            self.table = together(features)
        rows = torch.arange(len(self.table), device=self.device)
        if self.cfg.trains_texts:
            self.table, rows = in_memory(self.table).unique(dim=0, return_inverse=True)
        found = iter(rows.split([len(texts) for texts in kinds]))
        self.class_rows = next(found)
        # A missing text stands for row 0, with a mask that gives it no weight.
        self.image_rows = self.class_rows.new_zeros(len(data)) if data.image_texts is None else next(found)
        self.group_rows = self.class_rows.new_zeros(1) if data.group_texts is None else next(found)
        known = torch.full((len(data),), data.image_texts is not None, device=self.device)
        self.has_image_text = known if data.has_image_text is None else data.has_image_text

    def _fixed(self, texts: Matrix) -> Matrix:
        if isinstance(texts, Rows) or texts.is_floating_point():
            return through(texts, lambda rows: unit(at_least_float32(rows)))
        distinct, inverse = texts.unique(dim=0, return_inverse=True)
        return torch.cat([self.read(chunk) for chunk in distinct.split(256)])[inverse]

    def _class_features(self, by_sentence: Tensor) -> Tensor:
        return unit(by_sentence.unflatten(0, (-1, self.n_templates)).mean(1))

    def batches(self) -> Iterator[Batch]:
        """Images by seed, each with a random group of its pseudo-class (2.4)."""
        cfg, data = self.cfg, self.data
        n_classes = len(data.class_texts)
        draw_groups = _group_sampler(data.group_classes, n_classes, self.device)
        batch_draws, group_draws, view_draws = (torch.Generator().manual_seed(3 * self.seed + i) for i in range(3))
        for _ in range(self.n_steps // self.steps_per_epoch):
            for drawn in batches(cfg, len(data), self.steps_per_epoch, batch_draws):
                images = drawn.to(self.device)
                z = data.pseudo_labels[images]
                groups, has_group_text = draw_groups(z, group_draws)
                texts = torch.cat([self.class_rows, self.image_rows[images], self.group_rows[groups]])
                # Pixels are read by numbers that no GPU has to be asked for.
                inputs = {"images": drawn if cfg.trains_towers else images}
                if cfg.trains_towers and cfg.augment:
                    seeds = torch.randint(2**62, (len(drawn),), generator=view_draws)
                    inputs["images"] = torch.stack([drawn, seeds], 1)
                if cfg.trains_texts:
                    inputs["texts"], texts = texts.unique(return_inverse=True)
                about = _About(images=images, zero_shot_labels=z, texts=texts, has_group_text=has_group_text)
                yield Batch(inputs, about)

    def load(self, kind: str, rows: Tensor) -> Tensor:
        """Pixels of images, views where there are seeds; table rows of texts."""
        if kind == "texts":
            return self.table[rows]
        if not self.cfg.trains_towers or self.data.pixels is None:
            return self.image_features[rows]
        views = rows.ndim == 2
        numbers, seeds = (rows[:, 0], rows[:, 1]) if views else (rows, None)
        return self.data.pixels(numbers, seeds).to(self.device, non_blocking=True)

    def encode(self, kind: str, loaded: Tensor) -> Tensor:
        """Unit features of what `load` gave."""
        if kind == "texts":
            return self.read(loaded) if self.text_map is None else unit(loaded @ self.text_map)
        if self.cfg.trains_towers:
            embeds = at_least_float32(self.clip.encode_image(loaded, normalize=False))
            return unit(embeds if self.data.centre is None else embeds - self.data.centre)
        return loaded if self.image_map is None else unit(loaded @ self.image_map)

    def losses(self, features: Mapping[str, Tensor], about: _About) -> dict[str, Tensor]:
        """One loss for each kind of pseudo-label (4.7); what they do to the prototypes waits for `after_step`."""
        # index_select, as the gradient of plain indexing is summed in no fixed order.
        trained = self.cfg.trains_texts
        texts = features["texts"].index_select(0, about.texts) if trained else self.table[about.texts]
        n = len(about.images)
        by_sentence, image_texts, group_texts = texts.split([len(self.class_rows), n, n])
        self.batch = latte_step(
            self.cfg,
            features["images"],
            self._class_features(by_sentence),
            image_texts,
            group_texts,
            about.zero_shot_labels,
            self.prototypes,
            self.log_scale.exp(),
            mixer_prototypes=self.epoch_prototypes if self.cfg.mixer_prototypes == "epoch" else self.prototypes,
            has_image_text=self.has_image_text[about.images],
            has_group_text=about.has_group_text,
        )
        self.agreement = (self.batch.tuned_labels == about.zero_shot_labels).float().mean()
        if self.vocabulary is None:
            return self.batch.losses
        return {name: loss + self.vocabulary.untouched() for name, loss in self.batch.losses.items()}

    def optimizer(self) -> torch.optim.Optimizer | None:
        """AdamW that decays matrices only (3.2)."""
        trained = [p for p in self.parameters() if p.requires_grad]
        if not trained:
            return None
        cfg = self.cfg
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": cfg.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=cfg.peak_lr, betas=cfg.betas, eps=cfg.eps, fused=True)

    def learning_rate(self, step: int) -> float:
        """Warm-up, then a cosine (3.2)."""
        return warmup_cosine(step, self.cfg.peak_lr, self.cfg.warmup, self.n_steps)

    def after_step(self) -> Mapping[str, float]:
        """Prototypes move by the features from before the step; the scale is clamped.

        Returns:
            agreement (share of y = z), and class_weight, image_weight, group_weight (mean shares in the mixer).
        """
        self.prototypes = update_prototypes(self.prototypes, self.batch.labels, self.batch.contributions)
        self.log_scale.data.clamp_(0, MAX_LOG_SCALE)
        shares = zip(("class", "image", "group"), self.batch.weights.mean(1).tolist(), strict=True)
        return {"agreement": float(self.agreement), **{f"{name}_weight": share for name, share in shares}}

    def after_epoch(self) -> Mapping[str, float]:
        """The mixer's prototypes become those of now.

        Returns:
            scale, and drift (mean over classes of 1 - cosine of a prototype and its start).
        """
        self.epoch_prototypes = self.prototypes
        drift = (1 - (self.first_prototypes * self.prototypes).sum(1)).mean()
        return {"scale": float(self.log_scale.detach().exp()), "drift": float(drift)}

    def result(self, history: list[Stats]) -> Adapted:
        """The model as it is now; it cannot be trained on."""
        tuned = self.clip if self.cfg.trains_towers else None
        if self.vocabulary is not None:
            self.vocabulary.give_back()
        if tuned is not None:
            tuned.requires_grad_(False).logit_scale.fill_(float(self.log_scale.detach()))
        return Adapted(
            prototypes=self.prototypes,
            image_map=None if self.image_map is None else self.image_map.detach(),
            text_map=None if self.text_map is None else self.text_map.detach(),
            clip=tuned,
            scale=float(self.log_scale.detach().exp()),
            history=history,
        )


def tune(
    cfg: LatteClipSettings,
    data: TuneData,
    training: TrainingSettings | None = None,
    *,
    seed: int = 0,
    clip: Any = None,
    scale: float = 100.0,
    checkpoint: Checkpoint | None = None,
    on_epoch: Callable[[int, Stats], None] | None = None,
    on_step: Callable[[int, int, Stats], None] | None = None,
) -> Adapted:
    """Tune a classifier on unlabelled images and the texts about them; arguments as for `LatteClip` and `train`.

    Raises:
        ValueError: the configuration needs something that is not there.
        NonFiniteLossError: a loss is not finite.
    """
    method = LatteClip(cfg, data, seed=seed, clip=clip, scale=scale)
    history = train(method, training, seed=seed, checkpoint=checkpoint, on_epoch=on_epoch, on_step=on_step)
    return method.result(history)


def _check(cfg: LatteClipSettings, data: TuneData, has_clip: bool) -> None:
    """Raise ValueError when the configuration needs something that is not there."""
    if cfg.trains_towers and not (data.pixels and has_clip):
        raise ValueError(f"train={cfg.train!r} needs clip and pixels; with cached embeds use train='projections'")
    if not cfg.trains_towers and data.image_embeds is None:
        raise ValueError(f"train={cfg.train!r} needs image_embeds; on pixels use train='last_blocks' or 'all'")
    for name in ("class_texts", "image_texts", "group_texts"):
        texts = getattr(data, name)
        if texts is not None and not texts.is_floating_point() and not has_clip:
            raise ValueError(f"{name} are tokens and need clip to read them: give clip, or text embeds")
        if texts is not None and texts.is_floating_point() and cfg.trains_towers and cfg.trains_texts:
            raise ValueError(f"{name} are embeds, but the text tower trains: give tokens, or text_tower='frozen'")


def tower_parameters(clip: Any, cfg: LatteClipSettings) -> list[nn.Parameter]:
    """The parameters that `last_blocks` or `all` trains, without the scale."""
    named = {name: p for name, p in clip.named_parameters() if not name.startswith(NO_TOWERS)}
    if not cfg.trains_texts:
        named = {name: p for name, p in named.items() if name.startswith(IMAGE_TOWERS)}
    if cfg.train == "last_blocks":
        last = last_blocks(clip, IMAGE_TAILS, cfg.n_blocks)
        if cfg.trains_texts:
            last |= last_blocks(clip, TEXT_TAILS, cfg.n_blocks)
        named = {name: p for name, p in named.items() if name in last}
    return list(named.values())


def _own(clip: Any, trained: Sequence[Tensor]) -> Any:
    """A copy of the model for training; what is not trained, most of it at times, shares its memory."""
    ours = {id(each) for each in (*trained, clip.logit_scale)}
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in clip.parameters() if id(p) not in ours}
    return copy.deepcopy(clip, shared).eval().requires_grad_(False)


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
    # One more row, for a last class without group.
    by_class = torch.cat([classes.argsort(stable=True), classes.new_zeros(1)])
    count = torch.bincount(classes, minlength=n_classes)
    first = count.cumsum(0) - count

    def draw(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        n_groups = count[labels]
        position = (torch.rand(len(labels), generator=generator, dtype=torch.float64).to(device) * n_groups).long()
        return by_class[first[labels] + position], n_groups > 0

    return draw
