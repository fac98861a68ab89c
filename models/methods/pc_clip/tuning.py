"""PC-CLIP: a CLIP that reasons about differences (arXiv 2409.09721, TMLR 2025).

For pairs of images a language model has said how the first differs from the second. The text tower learns to put that
text where the difference of the two image features points; the image tower stays as it is. Numbers in brackets are
sections of the method's description, docs/methods.md. Symbols: `u`, `v` unit features of the first and the second
image, `delta` the direction of `u - v`, `t` unit features of texts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latteflow.models.methods.adaptation import Adapted, PairData, TuneData
from latteflow.models.methods.losses import clip_loss
from latteflow.models.methods.pc_clip import PcClipSettings
from latteflow.models.methods.pc_clip.comparative import compare_prompts
from latteflow.models.methods.training import Batch, Stats, Trainable, train
from latteflow.models.rows import Matrix, through
from latteflow.models.settings import TrainingSettings
from latteflow.models.towers.blocks import TextReader, text_blocks
from latteflow.models.vectors import at_least_float32, unit

SHORTEST_DIFFERENCE = 1e-4
"""Below it two images are the same, and the direction of their difference is noise (4.5)."""
DRIFT = 976 * 1e-8 * math.fsum(0.9**epoch for epoch in range(20))
"""How far Adam can move a weight in the paper's run: 976 steps an epoch at rates from 1e-8 down (4.4)."""
PROJECTION_DRIFT = 10 * DRIFT
"""One layer in place of twelve blocks. Chosen by held-out texts of training images of one domain, without labels."""


def difference(first: Tensor, second: Tensor) -> Tensor:
    """`u - v` of image embeds, `(n, dim)` each: each is normalized first. Not normalized again."""
    return unit(at_least_float32(first)) - unit(at_least_float32(second))


def pair_loss(
    difference: Tensor,
    texts: Tensor,
    temperature: float = 1.0,
    loss: Literal["contrastive", "squared_error"] = "contrastive",
) -> Tensor:
    """Loss of texts against the differences of their pairs (4.1).

    contrastive: `1/2 [mean_b CE(t_b . delta_c / tau over c, b) + mean_c CE(t_b . delta_c / tau over b, c)]` with
    `delta = (u - v) / |u - v|`; the other pairs of the batch are the negatives. squared_error: the mean of
    `(t - (u - v))^2` over all entries; the difference keeps its length.

    Args:
        difference: `u - v`, `(n, dim)`.
        texts: embeds of the texts, `(n, dim)`; normalized here.

    Returns:
        Scalar.
    """
    texts = unit(at_least_float32(texts))
    if loss == "squared_error":
        return F.mse_loss(texts, difference)
    return clip_loss(unit(difference), texts, 1 / temperature)


def drift_matched_lr(drift: float, steps_per_epoch: int, epochs: int = 20, decay: float = 0.9) -> float:
    """The first epoch's rate at which Adam can move a weight by `drift` in all (4.4).

    The paper's 1e-8 goes with half a million pairs; with a thousand it would change nothing.
    """
    return drift / (steps_per_epoch * math.fsum(decay**epoch for epoch in range(epochs)))


class _About(NamedTuple):
    """Rows of the pairs of a batch, and the row of each one's text among the batch's distinct ones, `(b,)` each."""

    pairs: Tensor
    texts: Tensor


class PcClip(Trainable):
    """PC-CLIP in training.

    Args:
        cfg: the configuration.
        image_features: unit rows, `(n, dim)`, centred where the classifier's are: a difference that the classifier can
            see is what the texts are about.
        pairs: image numbers and texts; tokens where the text tower's blocks train, embeds for `projection`.
        seed: of batches.
        clip: the model whose text tower is tuned; it is not changed. Not needed for `projection`.

    Raises:
        ValueError: fewer than two pairs of different images, or tokens without a CLIP to read them.
    """

    def __init__(
        self, cfg: PcClipSettings, image_features: Matrix, pairs: PairData, *, seed: int = 0, clip: Any = None
    ) -> None:
        super().__init__()
        self.cfg, self.seed = cfg, seed
        self.on_features = pairs.texts.is_floating_point()
        if cfg.train is not None and self.on_features != (cfg.train == "projection"):
            kind = "embeds" if self.on_features else "tokens"
            raise ValueError(f"train={cfg.train!r} and texts as {kind}: projection wants embeds, the others tokens")
        self.image_features = through(image_features, at_least_float32)
        length = self._difference(pairs.first, pairs.second).norm(dim=1)
        kept = (length >= SHORTEST_DIFFERENCE).nonzero().squeeze(1)
        if len(kept) < 2:
            raise ValueError(f"{len(kept)} of {len(length)} pairs are of different images; at least 2 are needed")
        self.first, self.second = pairs.first[kept], pairs.second[kept]
        self.table, self.text_rows = pairs.texts[kept].unique(dim=0, return_inverse=True)
        self.steps_per_epoch = math.ceil(len(kept) / cfg.batch_size)
        self.n_steps = cfg.epochs * self.steps_per_epoch
        self.text_map: nn.Parameter | None = None
        self.clip: Any = None
        if self.on_features:
            self.table = unit(at_least_float32(self.table))
            self.text_map = nn.Parameter(torch.eye(self.table.shape[1], device=self.table.device))
        else:
            if clip is None:
                raise ValueError("texts are tokens and need clip to read them: give clip, or embeds")
            self.clip = copy.deepcopy(clip).eval().requires_grad_(False)
            for parameter in text_blocks(self.clip, cfg.n_blocks if cfg.train == "last_blocks" else None):
                parameter.requires_grad_()
        self.read = TextReader(self.clip)

    def _difference(self, first: Tensor, second: Tensor) -> Tensor:
        return difference(self.image_features[first], self.image_features[second])

    def batches(self) -> Iterator[Batch]:
        """All pairs once an epoch, in a new order; batches of nearly the same size, as their pairs are negatives."""
        draws = torch.Generator().manual_seed(self.seed)
        for _ in range(self.cfg.epochs):
            for drawn in torch.randperm(len(self.first), generator=draws).tensor_split(self.steps_per_epoch):
                pairs = drawn.to(self.table.device)
                distinct, own = self.text_rows[pairs].unique(return_inverse=True)
                yield Batch({"texts": distinct}, _About(pairs, own))

    def load(self, kind: str, rows: Tensor) -> Tensor:
        """Tokens or features of texts."""
        return self.table[rows]

    def encode(self, kind: str, loaded: Tensor) -> Tensor:
        """Unit features of what `load` gave, or of any texts."""
        return self.read(loaded) if self.text_map is None else unit(loaded @ self.text_map)

    def losses(self, features: Mapping[str, Tensor], about: _About) -> dict[str, Tensor]:
        """The pair loss (4.1)."""
        delta = self._difference(self.first[about.pairs], self.second[about.pairs])
        texts = features["texts"].index_select(0, about.texts)
        self.cosine = (unit(delta) * texts.detach()).sum(1).mean()
        return {"pair_loss": pair_loss(delta, texts, self.cfg.temperature, self.cfg.loss)}

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam without weight decay (4.3)."""
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], fused=True)

    def learning_rate(self, step: int) -> float:
        """Falls after each epoch."""
        cfg, lr = self.cfg, self.cfg.lr
        if lr is None:
            drift = PROJECTION_DRIFT if self.on_features else DRIFT
            lr = drift_matched_lr(drift, self.steps_per_epoch, cfg.epochs, cfg.decay)
        return lr * cfg.decay ** (step // self.steps_per_epoch)

    def after_step(self) -> Mapping[str, float]:
        """Returns cosine, the mean over the batch of a text and its own difference: what to watch, as at temperature 1
        the loss can hardly move."""
        return {"cosine": float(self.cosine)}

    def average(self, clip: Any) -> None:
        """Mix the trained weights with those they began with (5.6)."""
        with torch.no_grad():
            if self.text_map is not None:
                self.text_map.lerp_(torch.eye(len(self.text_map), device=self.text_map.device), 1 - self.cfg.averaging)
            else:
                before = dict(clip.named_parameters())
                for name, parameter in self.clip.named_parameters():
                    if parameter.requires_grad:
                        parameter.lerp_(before[name].to(parameter), 1 - self.cfg.averaging)

    def features(self, texts: Tensor) -> Tensor:
        """Unit features of any texts, `(m, length or dim)`, read as trained; without gradient, `(m, dim)`."""
        with torch.no_grad():
            found = [self.encode("texts", unit(part) if self.on_features else part) for part in texts.split(256)]
        return torch.cat(found)


def tune_pairs(
    cfg: PcClipSettings,
    data: TuneData,
    training: TrainingSettings | None = None,
    *,
    seed: int = 0,
    clip: Any = None,
    scale: float = 100.0,
    **options: Any,
) -> Adapted:
    """Tune the text side on `data.pairs`; the classifier is the class sentences as it then reads them.

    Args:
        cfg: the configuration; without `train`, the kind of texts says what is trained.
        data: cached images and pairs. Class texts are tokens or embeds, as the pairs' texts are.
        seed: of batches.
        clip: see `PcClip`.
        scale: `exp(logit_scale)` of the CLIP, which stays.
        options: as for `training.train`.

    Raises:
        ValueError: there are no pairs, or too few.
    """
    if data.pairs is None:
        raise ValueError("pc_clip needs texts about pairs of images, and there are none")
    method = PcClip(cfg, data.image_features, data.pairs, seed=seed, clip=clip)
    history: list[Stats] = train(method, training, seed=seed, **options)
    if cfg.averaging < 1:
        method.average(clip)
    templates = data.class_texts if data.class_texts.ndim == 3 else data.class_texts[:, None]
    prototypes = unit(method.features(templates.flatten(0, 1)).unflatten(0, templates.shape[:2]).mean(1))
    pairs = data.pairs
    if pairs.class_pairs is not None and pairs.class_texts is not None and len(pairs.class_pairs):
        about: Sequence[tuple[int, int]] = [(a, b) for a, b in pairs.class_pairs.tolist()]
        compared = compare_prompts(prototypes.cpu().numpy(), about, method.features(pairs.class_texts).cpu().numpy())
        prototypes = torch.from_numpy(compared).to(prototypes)
    return Adapted(
        prototypes=prototypes,
        scale=scale,
        text_map=None if method.text_map is None else method.text_map.detach(),
        clip=None if method.clip is None else method.clip.requires_grad_(False),
        history=history,
    )
