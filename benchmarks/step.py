"""One training step of LatteCLIP against the plain schedule of its released code: time and memory.

    python -m benchmarks.step            # all; a line for each variant, and the ratios
    python -m benchmarks.step --batch 64 --steps 4

The plain schedule is what the released code does for each batch, and nothing worse: both towers by gradient
checkpointing; 4 x batch texts of full length, the class sentences of every sample and branch among them, tokenized
again; margins of each kind of text by themselves and twice where both branches need them; prototypes as a Python loop;
a second augmented view that is made and thrown away. The second model that it loads and does not use is the one that
every way here starts from and keeps. The mathematics is the same, and tests/models/methods/test_plain_schedule.py
holds it so: the product against the plain schedule, and the plain schedule against itself with each saving alone.

Same model (an open_clip architecture with random weights), same batch, same captions, same processor. Each variant runs
in a process of its own; memory is its peak while it trains, less what it held before it built the model. Processor time
is that of all threads, the same on a busy machine.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import open_clip
import torch
from torch import Tensor

from latteflow.models import products
from latteflow.models.methods.adaptation import Adapted, TuneData
from latteflow.models.methods.latteclip import LatteClipSettings
from latteflow.models.methods.latteclip.tuning import LatteClip, margins, tower_parameters
from latteflow.models.methods.losses import clip_loss
from latteflow.models.methods.training import train
from latteflow.models.settings import TrainingSettings
from latteflow.models.vectors import unit

MODEL: dict[str, Any] = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 224, "layers": 6, "width": 384, "patch_size": 32, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 6},
}
SAVINGS = ("class_texts_once", "trimmed", "tokens_once", "no_recomputation", "one_view", "no_loops")
"""What the product does not do, switch by switch; none changes a result."""

Tokenize = Callable[[list[str]], Tensor]
_DISTINCT = 256
"""Images of noise that are made; more would only fill the memory."""


@dataclass(frozen=True)
class Texts:
    """The domain's texts as strings; row i of images, and a group's description for each image."""

    classes: list[str]
    images: list[str]
    groups: list[str]


def plain_schedule(
    cfg: LatteClipSettings,
    data: TuneData,
    texts: Texts,
    tokenize: Tokenize,
    clip: Any,
    *,
    batches: Iterator[tuple[Tensor, Tensor | None]],
    n_steps: int,
    steps_per_epoch: int,
    learning_rate: Callable[[int], float],
    savings: Collection[str] = (),
    on_step: Callable[[], None] = lambda: None,
) -> Adapted:
    """LatteCLIP with towers trained, as the released code goes about it; on the device of the model.

    Args:
        batches: image numbers and seeds of the views, as `LatteClip.batches` draws them.
        savings: of SAVINGS, those that are on.
    """
    model = copy.deepcopy(clip).eval()
    device = model.logit_scale.device
    model.requires_grad_(False)
    for parameter in (*tower_parameters(model, cfg), model.logit_scale):
        parameter.requires_grad_()
    if "no_recomputation" not in savings:
        model.set_grad_checkpointing()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": cfg.weight_decay},
            {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=0.0, betas=cfg.betas, eps=cfg.eps,
    )  # fmt: skip
    ready = {text: tokenize([text])[0] for text in {*texts.classes, *texts.images, *texts.groups}}

    def tokens(sentences: list[str]) -> Tensor:
        found = torch.stack([ready[s] for s in sentences]) if "tokens_once" in savings else tokenize(sentences)
        return found.to(device)

    def read(rows: Tensor) -> Tensor:
        if "trimmed" in savings:
            length = int(rows.count_nonzero(1).max())
            lent = {"positional_embedding": model.positional_embedding[:length]}
            lent["attn_mask"] = model.attn_mask[:length, :length]
            return unit(torch.func.functional_call(model, lent, kwargs={"text": rows[:, :length]})[1])
        return unit(model.encode_text(rows))

    with torch.no_grad():
        model.train(False)
        prototypes = read(tokens(texts.classes))
    model.train("no_recomputation" not in savings)  # open_clip recomputes only in training mode
    history = []
    for step, (images, seeds) in zip(range(n_steps), batches, strict=False):
        if step % steps_per_epoch == 0:
            epoch_prototypes = prototypes
        assert data.pixels is not None
        pixels = data.pixels(images, seeds).to(device)
        if "one_view" not in savings:
            data.pixels(images, seeds)
        v = unit(model.encode_image(pixels))
        z = data.pseudo_labels[images.to(device)].tolist()
        y = (v.detach() @ prototypes.T).argmax(1).tolist()
        described = read(tokens([texts.images[i] for i in images]))
        grouped = read(tokens([texts.groups[i] for i in images]))
        if "class_texts_once" in savings:
            table = read(tokens(texts.classes))
            of_label = {
                name: table.index_select(0, torch.tensor(labels, device=device))
                for name, labels in (("y", y), ("z", z))
            }
        else:
            of_label = {name: read(tokens([texts.classes[k] for k in labels])) for name, labels in (("y", y), ("z", z))}
        loss, contributions = torch.zeros((), dtype=v.dtype, device=device), []
        for name, labels in (("y", y), ("z", z)):
            weights = torch.stack([margins(t, epoch_prototypes) for t in (of_label[name], described, grouped)])
            mixed = (weights[..., None] * torch.stack([of_label[name], described, grouped])).sum(0)
            mixed = mixed / weights.sum(0)[:, None]
            if "no_loops" in savings:
                near = prototypes[torch.tensor(labels)]
            else:
                near = torch.stack([prototypes[label] for label in labels])
            target = (1 - cfg.alpha) * near + cfg.alpha * mixed
            loss = loss + clip_loss(v, target, model.logit_scale.exp())
            contributions.append((labels, target.detach()))
        optimizer.zero_grad()
        loss.backward()
        prototypes = _moved(prototypes, contributions, loops="no_loops" not in savings)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        model.logit_scale.data.clamp_(0, torch.tensor(100.0).log())
        history.append({"loss": float(loss.detach())})
        on_step()
    return Adapted(prototypes=prototypes, scale=float(model.logit_scale.detach().exp()), clip=model, history=history)


def _moved(prototypes: Tensor, contributions: list[tuple[list[int], Tensor]], *, loops: bool) -> Tensor:
    """Each class's prototype becomes the unit mean of its targets."""
    if not loops:
        labels = torch.tensor([label for each, _ in contributions for label in each], device=prototypes.device)
        sums = torch.zeros_like(prototypes).index_add_(0, labels, torch.cat([target for _, target in contributions]))
        counts = torch.bincount(labels, minlength=len(prototypes))[:, None]
        return torch.where(counts > 0, unit(sums / counts.clamp(min=1)), prototypes)
    by_class: dict[int, list[Tensor]] = {}
    for labels_of, target in contributions:
        for label, row in zip(labels_of, target, strict=True):
            by_class.setdefault(label, []).append(row)
    rows = [unit(sum(by_class[k]) / len(by_class[k])) if k in by_class else old for k, old in enumerate(prototypes)]
    return torch.stack(rows)


# --- the measurement --------------------------------------------------------------------------------------------------


Work = tuple[LatteClipSettings, TuneData, Texts, Tokenize]


def domain(n: int, batch: int, trained: Literal["all", "last_blocks"] = "all", side: int = 224) -> Work:
    """Images of noise and captions of some twenty words, about ten classes, as EuroSAT has them.

    Args:
        trained: what LatteCLIP is to train.
        side: of the images, in pixels.
    """
    tokenize = open_clip.get_tokenizer("ViT-B-32")
    draws = torch.Generator().manual_seed(0)
    words = ["river", "road", "field", "forest", "house", "crop", "water", "green", "brown", "long", "wide", "small"]

    def sentence() -> str:
        return " ".join(words[i] for i in torch.randint(len(words), (22,), generator=draws))

    texts = Texts(
        classes=[f"a centered satellite photo of {a} {b}." for a in words[:5] for b in ("land", "area")],
        images=[f"the image shows {sentence()}" for _ in range(n)],
        groups=[f"the images show {sentence()}" for _ in range(n)],
    )
    images = torch.randn((min(n, _DISTINCT), 3, side, side), generator=draws)

    def pixels(rows: Tensor, seeds: Tensor | None) -> Tensor:
        return images[rows % len(images)]

    data = TuneData(
        pseudo_labels=torch.randint(10, (n,), generator=draws), class_texts=tokenize(texts.classes),
        image_texts=tokenize(texts.images), pixels=pixels,
    )  # fmt: skip
    # One group for each class, so that both sides draw the same ones.
    groups = [texts.groups[k] for k in range(10)]
    texts = replace(texts, groups=[groups[k] for k in data.pseudo_labels])
    data = replace(data, group_texts=tokenize(groups), group_classes=torch.arange(10))
    cfg = LatteClipSettings(train=trained, batch_size=batch, epochs=1, lr=1e-6, scale=100.0)
    return cfg, data, texts, tokenize


def run(variant: str, batch: int, steps: int) -> tuple[list[float], list[float], float]:
    """Seconds of each step, seconds of its processor time, MiB of memory above what was held before the model."""
    work = domain(batch * steps, batch)
    before = _peak()
    torch.manual_seed(0)
    clip, times = open_clip.CLIP(**MODEL), list[tuple[float, float]]()

    def ended(*_: Any) -> None:
        times.append((time.perf_counter(), time.process_time()))

    if variant.startswith("product"):
        last = variant.split()[-1]
        micro = int(last) if last.isdigit() else None
        if last == "MKL":
            products._is_slow = lambda: False  # type: ignore[assignment]
        product(work, clip, TrainingSettings(micro_batch=micro), ended)
    else:
        plain(
            work, clip, [] if variant == "plain" else SAVINGS if variant == "plain, all savings" else [variant], ended
        )
    wall, processor = ([after - now for now, after in pairwise(clock)] for clock in zip(*times, strict=True))
    return wall, processor, _peak() - before


def product(
    work: Work,
    clip: Any,
    settings: TrainingSettings,
    ended: Callable[..., None],
    changed: Callable[[LatteClip], None] = lambda method: None,
) -> None:
    """The product's steps.

    Args:
        changed: is given the method before it trains.
    """
    cfg, data, _, _ = work
    method = LatteClip(cfg, data.to(clip.logit_scale.device), clip=clip)
    changed(method)
    train(method, settings, on_step=ended)


def plain(work: Work, clip: Any, savings: Collection[str], ended: Callable[[], None]) -> None:
    """The plain schedule's, on the batches that the product would draw."""
    cfg, data, texts, tokenize = work
    data = data.to(clip.logit_scale.device)
    drawn = LatteClip(cfg, data, clip=clip)
    rows = [batch.inputs["images"] for batch in drawn.batches()]
    how = {"n_steps": drawn.n_steps, "steps_per_epoch": drawn.steps_per_epoch, "learning_rate": drawn.learning_rate}
    drawn.clip = drawn.read = None  # a model that is only here for what it draws is no part of what is measured
    batches = ((each[:, 0], each[:, 1]) for each in rows)
    plain_schedule(cfg, data, texts, tokenize, clip, batches=batches, savings=savings, on_step=ended, **how)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--each", action="store_true", help="the plain schedule with each saving alone, too")
    args = parser.parse_args()
    each = [*SAVINGS, "plain, all savings"] if args.each else []
    halves, thirds = -(-args.batch // 2), -(-args.batch // 3)
    variants = ["plain", *each, "product", "product by MKL", f"product {halves}", f"product {thirds}"]
    found = {}
    for variant in variants:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[variant] = pool.apply(run, (variant, args.batch, args.steps))
    plain_s, plain_processor_s, memory = _middle(found["plain"])
    sys.stdout.write(
        f"batch {args.batch}, median of {args.steps - 1} steps; product {halves}: in micro-batches of {halves}; "
        "by MKL: with PyTorch's own matrix products\n"
    )
    for variant, each in found.items():
        now_s, processor_s, peak = _middle(each)
        sys.stdout.write(
            f"{variant:22} {now_s:6.2f} s/step  x{plain_s / now_s:5.2f}   processor {processor_s:6.2f} s  "
            f"x{plain_processor_s / processor_s:5.2f}   {peak:7.0f} MiB  {100 * peak / memory:4.0f} %\n"
        )


def _middle(measured: tuple[list[float], list[float], float]) -> tuple[float, float, float]:
    wall, processor, peak = measured
    return statistics.median(wall), statistics.median(processor), peak


if __name__ == "__main__":
    main()
