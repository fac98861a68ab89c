"""CLAMP in training: pairs of images and texts, a contrastive loss, and distillation from the CLIP's own text tower."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latteflow.models.methods.clamp.losses import contrastive, distillation
from latteflow.models.methods.clamp.tower import MAX_SCALE, ClampTower, States
from latteflow.models.methods.training import Batch, Trainable
from latteflow.models.rows import Matrix
from latteflow.models.schedule import warmup_cosine


@dataclass(frozen=True, kw_only=True)
class ClampData:
    """What is known of a domain of n images. There is no place for a label.

    Attributes:
        image_features: unit rows of the CLIP, `(n, dim)`.
        texts: every text, once: descriptions of images and groups, class names.
        teacher: the CLIP's own unit features of the texts, `(texts, dim)`.
        teacher_scale: its `exp(logit_scale)`.
        image_texts: number of each image's description, `(n,)` int64; -1 where there is none.
        group_texts: for each image the numbers of the descriptions of groups it is in.
        class_texts: for each class the numbers of its names.
        pseudo_labels: zero-shot class of each image, `(n,)` int64.

    Raises:
        ValueError: fewer than two images, or a text occurs twice.
    """

    image_features: Matrix
    texts: Sequence[str]
    teacher: Matrix
    teacher_scale: float
    image_texts: Tensor
    group_texts: Sequence[Sequence[int]]
    class_texts: Sequence[Sequence[int]]
    pseudo_labels: Tensor

    def __post_init__(self) -> None:
        if len(self.image_features) < 2:
            raise ValueError(f"CLAMP learns an image's text from those of others; got {len(self.image_features)} image")
        if len(set(self.texts)) < len(self.texts):
            raise ValueError("a text occurs twice, and would be its own negative; give each once")


@dataclass(frozen=True)
class _About:
    """Image and text of each pair of a batch, and the row of the text among those that are encoded, `(b,)` each."""

    images: Tensor
    texts: Tensor
    rows: Tensor


class Clamp(Trainable):
    """CLAMP in training (section 4). Images are cached; each distinct text of a batch is encoded once.

    Args:
        tower: changed in place.
        seed: of batches and of which text stands for an image.
    """

    def __init__(self, tower: ClampTower, data: ClampData, *, seed: int = 0) -> None:
        super().__init__()
        cfg = tower.settings
        self.tower, self.data, self.cfg, self.seed = tower.train(), data, cfg, seed
        self.images, self.teacher = data.image_features.to(tower.device), data.teacher.to(tower.device)
        n = len(self.images)
        # A batch of one pair has no negatives, so the last ones are shared out.
        self.steps_per_epoch = max(1, min(math.ceil(n / cfg.batch_size), n // 2))
        self.n_steps, self.clip_norm = cfg.pool_steps + cfg.steps, cfg.clip_norm
        self.tokens = tower.wrapper(data.texts)
        self.lengths = self.tokens.valid.sum(1)
        self.kept = KeptStates(tower, cfg.cache_gb)
        self.asked: dict[int, Tensor] = {}

    def batches(self) -> Iterator[Batch]:
        """Each image once for each epoch, with a text of its own, of its groups, or of its pseudo-class (3, 9)."""
        draws = torch.Generator().manual_seed(self.seed)
        for step in range(self.n_steps):
            if step % self.steps_per_epoch == 0:
                parts = iter(torch.randperm(len(self.images), generator=draws).tensor_split(self.steps_per_epoch))
            images = next(parts)
            chances = torch.rand(len(images), 3, generator=draws, dtype=torch.float64).tolist()
            texts = torch.tensor([self._text(i, *each) for i, each in zip(images.tolist(), chances, strict=True)])
            distinct, rows = texts.unique(return_inverse=True)
            order = self.lengths[distinct].argsort(stable=True)  # so that a micro-batch is nearly free of padding
            kind = "asked" if step < self.cfg.pool_steps else "texts"
            yield Batch({kind: distinct[order]}, _About(images, texts, order.argsort()[rows]))

    def _text(self, image: int, of_class: float, of_group: float, which: float) -> int:
        data, groups, own = self.data, self.data.group_texts[image], int(self.data.image_texts[image])
        if of_class < self.cfg.class_share or not (groups or own >= 0):
            choice = data.class_texts[int(data.pseudo_labels[image])]
        elif groups and (of_group < self.cfg.group_share or own < 0):
            choice = groups
        else:
            return own
        return choice[int(which * len(choice))]

    def encode(self, kind: str, loaded: Tensor) -> Tensor:
        """Unit features of texts by number; what the language model made of them is taken from memory, if it can be."""
        if not len(loaded):
            return torch.zeros(0, self.images.shape[1], device=self.images.device)
        if kind == "asked":
            return self.tower.pooled(self._asked(loaded.tolist()))
        self.asked.clear()  # the prompts are about to move
        tokens = self.tokens[loaded]
        if self.cfg.lora_rank:
            return self.tower(tokens)
        return self.tower.encode(tokens.valid, self.kept.states(loaded.tolist(), tokens))

    def _asked(self, numbers: Sequence[int]) -> Tensor:
        """States at prompts that do not learn yet: of each text once."""
        new = [number for number in numbers if number not in self.asked]
        if new:
            with torch.no_grad():
                tokens = self.tokens[torch.tensor(new)]
                states = self.tower.read(tokens) if self.cfg.lora_rank else self.kept.states(new, tokens)
                self.asked |= dict(zip(new, self.tower.ask(tokens.valid, states), strict=True))
        return torch.stack([self.asked[number] for number in numbers])

    def losses(self, features: Mapping[str, Tensor], about: _About) -> dict[str, Tensor]:
        """Contrastive loss and distillation of the whole batch."""
        cfg, device = self.cfg, self.images.device
        images = self.images[about.images.to(device)]
        # index_select, as the gradient of plain indexing is summed in no fixed order.
        texts = next(iter(features.values())).index_select(0, about.rows.to(device))
        ids, scale = about.texts.to(device), self.tower.log_scale.exp()
        found = {"contrastive_loss": contrastive(images, texts, scale, text_ids=ids, reduction=cfg.reduction)}
        if cfg.distill:
            found["distill_loss"] = cfg.distill * distillation(
                images,
                texts,
                images @ self.teacher[ids].T,
                teacher_scale=self.data.teacher_scale,
                student_scale=self.data.teacher_scale if cfg.distill_scale == "teacher" else scale,
                reduction=cfg.reduction,
            )
        return found

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW that decays matrices only, without the prompts; LoRA has a rate of its own."""
        cfg, groups = self.cfg, []
        named = [(name, p) for name, p in self.tower.named_parameters() if p.requires_grad]
        for rate, is_lora in ((cfg.lr, False), (cfg.lora_lr, True)):
            for decay, decays in ((cfg.weight_decay, True), (0.0, False)):
                chosen: list[nn.Parameter] = [
                    p
                    for name, p in named
                    if ("lora_" in name) == is_lora and (p.ndim >= 2 and name != "prompts") == decays
                ]
                if chosen:
                    groups.append({"params": chosen, "weight_decay": decay, "lr_scale": rate})
        return torch.optim.AdamW(groups, lr=1.0, betas=cfg.betas, eps=cfg.eps, fused=True)

    def learning_rate(self, step: int) -> float:
        """As a share of each group's highest rate: warm-up and a cosine (5), for the pool alone and then for all."""
        before = self.cfg.pool_steps
        step, n_steps = (step, before) if step < before else (step - before, self.cfg.steps)
        return warmup_cosine(step, 1.0, round(self.cfg.warmup * n_steps), n_steps)

    def after_step(self) -> Mapping[str, float]:
        """Holds the scale to at most 100."""
        log_scale = self.tower.log_scale
        log_scale.data.clamp_(max=math.log(MAX_SCALE))
        return {"scale": float(log_scale.detach().exp())}


class KeptStates:
    """Keys and values that a language model without LoRA made of texts, up to a budget of memory.

    Args:
        gigabytes: of 1e9 bytes. Texts beyond it are read each time they are asked for.
    """

    def __init__(self, tower: ClampTower, gigabytes: float) -> None:
        self._tower, self._left = tower, gigabytes * 1e9
        self._rows: dict[int, Tensor] = {}
        self._shapes: list[tuple[int, int]] = []

    def states(self, numbers: Sequence[int], tokens: Any) -> States:
        """Of texts by number, whose tokens are given, padded on the right."""
        new = [place for place, number in enumerate(numbers) if number not in self._rows]
        fresh = dict(zip(new, self._read(tokens[torch.tensor(new)]), strict=True)) if new else {}
        for place, row in fresh.items():
            if row.nbytes <= self._left:
                self._rows[numbers[place]] = row
                self._left -= row.nbytes
        rows = [fresh[place] if place in fresh else self._rows[number] for place, number in enumerate(numbers)]
        # One row for each token, with all layers side by side, is what pads and copies fastest.
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        widths = [heads * width for heads, width in self._shapes]
        pieces = [
            piece.unflatten(2, shape).transpose(1, 2)
            for piece, shape in zip(padded.split(widths, dim=2), self._shapes, strict=True)
        ]
        return list(zip(pieces[::2], pieces[1::2], strict=True))

    def _read(self, tokens: Any) -> list[Tensor]:
        with torch.no_grad():
            flat = [each for layer in self._tower.read(tokens) for each in layer]
        self._shapes = [(each.shape[1], each.shape[3]) for each in flat]
        together = torch.cat([each.transpose(1, 2).flatten(2) for each in flat], dim=2)
        return [row[:length].clone() for row, length in zip(together, tokens.valid.sum(1).tolist(), strict=True)]
