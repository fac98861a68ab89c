"""What LatteCLIP is compared with: FLYP, FLYP averaged with zero-shot, and self-training on pseudo-labels.

All train what LatteCLIP's `projections` trains, one linear map after the image tower, on the same cached embeds, with
the same batches, steps and learning rate: they differ in the loss and nothing else. They read no text but the classes'.
FLYP can train towers as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latteflow.models.methods.adaptation import Adapted, TuneData
from latteflow.models.methods.latteclip import OF_TEXTS, LatteClipSettings
from latteflow.models.methods.latteclip.tuning import batches, tune
from latteflow.models.methods.training import Batch, Trainable, train
from latteflow.models.rows import blocks
from latteflow.models.schedule import warmup_cosine
from latteflow.models.settings import TrainingSettings
from latteflow.models.vectors import unit


def flyp(cfg: LatteClipSettings, data: TuneData, training: TrainingSettings | None = None, **options: Any) -> Adapted:
    """Finetune Like You Pretrain (arXiv 2212.00638) on zero-shot pseudo-labels; options as for `latteclip.tune`.

    The contrastive loss of images against the class text of their pseudo-label. That is LatteCLIP with alpha = 0 and
    one label, whose prototypes stay the class texts.
    """
    only = LatteClipSettings(**cfg.model_dump(exclude=OF_TEXTS), alpha=0.0, labels="zero_shot")
    return tune(only, data, training, **options)


def wise_ft(
    cfg: LatteClipSettings, data: TuneData, training: TrainingSettings | None = None, **options: Any
) -> Adapted:
    """FLYP, and then the mean of its weights and zero-shot's (WiSE-FT, arXiv 2109.01903, mixing coefficient 0.5)."""
    tuned = flyp(cfg, data, training, **options)

    def halfway(changed: Tensor, before: Tensor) -> Tensor:
        return torch.lerp(before, changed, 0.5)

    clip = tuned.clip
    if clip is not None:
        before = options["clip"].state_dict()
        clip.load_state_dict(
            {name: halfway(t, before[name]) if t.is_floating_point() else t for name, t in clip.state_dict().items()}
        )

    def mapped(found: Tensor | None) -> Tensor | None:
        return None if found is None else halfway(found, torch.eye(len(found), dtype=found.dtype, device=found.device))

    return replace(tuned, image_map=mapped(tuned.image_map), text_map=mapped(tuned.text_map))


class SelfTraining(Trainable):
    """Self-training on CLIP features: cross-entropy on the labels that the model itself gave at the epoch's start.

    The first epoch's are zero-shot's (`data.pseudo_labels`). The classifier stays the class texts; the map learns.

    Args:
        cfg: batch size, epochs, rates and the loss's scale are used.
        data: class texts must be embeds, and images cached.
        seed: of batches.
        scale: `exp(logit_scale)` of the CLIP.
    """

    labels: Tensor

    def __init__(self, cfg: LatteClipSettings, data: TuneData, *, seed: int = 0, scale: float = 100.0) -> None:
        super().__init__()
        self.cfg, self.seed, self.scale = cfg, seed, cfg.first_scale(scale)
        self.x, self.classes = data.image_features, data.class_features
        self.zero_shot = data.pseudo_labels
        self.image_map = nn.Parameter(torch.eye(self.x.shape[1], dtype=self.x.dtype, device=self.x.device))
        self.register_buffer("labels", data.pseudo_labels.clone())
        self.steps_per_epoch = cfg.n_steps(len(self.x))
        self.n_steps = cfg.n_epochs(len(self.x)) * self.steps_per_epoch

    def batches(self) -> Iterator[Batch]:
        """Images by seed, as LatteCLIP draws them."""
        draws = torch.Generator().manual_seed(3 * self.seed)
        for _ in range(self.n_steps // self.steps_per_epoch):
            for drawn in batches(self.cfg, len(self.x), self.steps_per_epoch, draws):
                rows = drawn.to(self.x.device)
                yield Batch({"images": rows}, rows)

    def load(self, kind: str, rows: Tensor) -> Tensor:
        """Cached features."""
        return self.x[rows]

    def encode(self, kind: str, loaded: Tensor) -> Tensor:
        """Features behind the map."""
        return unit(loaded @ self.image_map)

    def losses(self, features: Mapping[str, Tensor], about: Tensor) -> dict[str, Tensor]:
        """Cross-entropy against the model's own labels."""
        return {"self_loss": F.cross_entropy(self.scale * features["images"] @ self.classes.T, self.labels[about])}

    def optimizer(self) -> torch.optim.Optimizer:
        """LatteCLIP's."""
        cfg = self.cfg
        return torch.optim.AdamW(
            [self.image_map], lr=cfg.peak_lr, betas=cfg.betas, eps=cfg.eps, weight_decay=cfg.weight_decay
        )

    def learning_rate(self, step: int) -> float:
        """LatteCLIP's."""
        return warmup_cosine(step, self.cfg.peak_lr, self.cfg.warmup, self.n_steps)

    def after_epoch(self) -> Mapping[str, float]:
        """New labels. Returns agreement, the share of them that are still zero-shot's."""
        with torch.no_grad():
            found = [(self.encode("images", block) @ self.classes.T).argmax(1) for _, block in blocks(self.x)]
            self.labels = torch.cat(found)
        return {"agreement": float((self.labels == self.zero_shot).float().mean())}


def self_training(
    cfg: LatteClipSettings,
    data: TuneData,
    training: TrainingSettings | None = None,
    *,
    seed: int = 0,
    scale: float = 100.0,
    **options: Any,
) -> Adapted:
    """Adapt by `SelfTraining`; options as for `training.train`."""
    method = SelfTraining(cfg, data, seed=seed, scale=scale)
    history = train(method, training, seed=seed, **options)
    return Adapted(prototypes=method.classes, scale=scale, image_map=method.image_map.detach(), history=history)
