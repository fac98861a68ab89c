"""What LatteCLIP is compared with: FLYP, and self-training on pseudo-labels.

Both train what LatteCLIP's `projections` trains, one linear map after the image tower, on the same cached embeds, with
the same batches, steps and learning rate: they differ in the loss and nothing else. They read no text but the classes'.
FLYP can train towers as well.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.latteclip import LatteClipResult, Stats, TuneData, batches, tune, unit
from models.losses import at_least_float32
from models.schedule import steps_per_epoch, warmup_cosine
from models.settings import OF_TEXTS, LatteClipSettings


def flyp(
    cfg: LatteClipSettings,
    data: TuneData,
    *,
    seed: int = 0,
    clip: nn.Module | None = None,
    scale: float = 100.0,
    on_epoch: Callable[[int, Stats], None] | None = None,
) -> LatteClipResult:
    """Finetune Like You Pretrain (arXiv 2212.00638) on zero-shot pseudo-labels.

    The contrastive loss of images against the class text of their pseudo-label. That is LatteCLIP with alpha = 0 and
    one label, whose prototypes stay the class texts.
    """
    only = LatteClipSettings(**cfg.model_dump(exclude=OF_TEXTS), alpha=0.0, labels="zero_shot")
    return tune(only, data, seed=seed, clip=clip, scale=scale, on_epoch=on_epoch)


def self_training(
    cfg: LatteClipSettings,
    data: TuneData,
    *,
    seed: int = 0,
    scale: float = 100.0,
    on_epoch: Callable[[int, Stats], None] | None = None,
) -> LatteClipResult:
    """Self-training on CLIP features: cross-entropy on the labels that the model itself gave at the epoch's start.

    The first epoch's are zero-shot's (`data.pseudo_labels`). The classifier stays the class texts; the map learns.

    Args:
        cfg: batch size, epochs, rates and the loss's scale are used.
        data: class texts must be embeds, and images cached.
    """
    if data.image_embeds is None or not data.class_texts.is_floating_point():
        raise ValueError("self_training needs cached image_embeds and class texts as embeds")
    embeds = at_least_float32(data.image_embeds)
    x = unit(embeds if data.centre is None else embeds - data.centre)
    classes = class_features(data)
    image_map = nn.Parameter(torch.eye(x.shape[1], dtype=x.dtype, device=x.device))
    optimizer = torch.optim.AdamW(
        [image_map], lr=cfg.peak_lr, betas=cfg.betas, eps=cfg.eps, weight_decay=cfg.weight_decay
    )
    generator = torch.Generator().manual_seed(3 * seed)
    n_steps, n_epochs = steps_per_epoch(len(x), cfg.batch_size), cfg.n_epochs(len(x))
    history: list[Stats] = []
    labels, step = data.pseudo_labels, 0
    for epoch in range(n_epochs):
        losses = []
        for drawn in batches(cfg, len(x), n_steps, generator):
            rows = drawn.to(x.device)
            logits = cfg.first_scale(scale) * unit(x[rows] @ image_map) @ classes.T
            loss = F.cross_entropy(logits, labels[rows])
            for group in optimizer.param_groups:
                group["lr"] = warmup_cosine(step, cfg.peak_lr, cfg.warmup, n_epochs * n_steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            step += 1
        with torch.no_grad():
            labels = (unit(x @ image_map) @ classes.T).argmax(1)
        agreement = float((labels == data.pseudo_labels).float().mean())
        history.append({"epoch": epoch, "loss": sum(losses) / len(losses), "agreement": agreement})
        if on_epoch is not None:
            on_epoch(epoch, history[-1])
    return LatteClipResult(
        prototypes=classes, image_map=image_map.detach(), text_map=None, clip=None, scale=scale, history=history
    )


def class_features(data: TuneData) -> Tensor:
    """Unit text feature of each class, `(classes, dim)`, the mean direction over its templates."""
    texts = unit(at_least_float32(data.class_texts))
    return unit(texts.mean(1)) if texts.ndim == 3 else texts
