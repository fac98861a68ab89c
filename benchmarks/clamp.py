"""CLAMP: what keeping the language model's reading of texts saves, memory of a large batch, what LoRA does to writing.

    python -m benchmarks.clamp --lm embedded --words 25
    python -m benchmarks.clamp --lm embedded --words 25 --memory 256 --micro-batch 16
    python -m benchmarks.clamp --lm embedded --words 5 --generate --steps 20

The first prints steps per second of the same training three ways: keys and values of texts kept; read anew at each
step; and text and prompts in one pass under the whole mask, as the method is written down. The second trains one step
on a batch and prints the peak memory of the process. The third trains with LoRA of rank 16 and compares what the model
writes after fixed prompts, and its perplexity on a fixed text, with LoRA off and on, to the model as it came.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import resource
import sys
import time
from typing import Any

import torch

from latteflow.models.methods.clamp import ClampSettings, lm
from latteflow.models.methods.clamp.masks import positions, read_only_mask
from latteflow.models.methods.clamp.tower import ClampTower
from latteflow.models.methods.clamp.training import Clamp, ClampData
from latteflow.models.methods.training import train
from latteflow.models.settings import TrainingSettings
from latteflow.models.vectors import unit

WIDTH = 512
WORDS = "a red blue small large round wooden metal plate chair on under the table near window with two three dark light"

PROMPTS = [
    "The capital of France is", "A sneaker is a kind of", "Water boils at", "1, 2, 3, 4,", "The opposite of hot is",
    "Once upon a time there was a", "My favourite animal is the", "To make a cup of tea, first",
]  # fmt: skip
PROSE = (
    "The library opens at nine in the morning and closes at six. Visitors may borrow up to ten books for four weeks. "
    "Those who bring a book back late pay a small fee, which the library spends on new chairs and lamps."
)


class OnePass(Clamp):
    """Text and prompts go through the language model together."""

    def encode(self, kind: str, loaded: torch.Tensor) -> torch.Tensor:
        tower, tokens = self.tower, self.tokens[loaded]
        ids, valid = tokens.ids.to(tower.device), tokens.valid.to(tower.device)
        mask = read_only_mask(valid, len(tower.prompts), self.cfg.prompt_mask)[:, None]
        states = tower.lm.base_model(
            inputs_embeds=torch.cat(
                [tower.lm.get_input_embeddings()(ids), tower.prompts.expand(len(ids), -1, -1)], dim=1
            ),
            attention_mask=torch.zeros(mask.shape, device=ids.device).masked_fill(
                ~mask, torch.finfo(torch.float32).min
            ),
            position_ids=positions(valid, len(tower.prompts)),
            use_cache=False,
        ).last_hidden_state
        return unit(tower.pool(states[:, -len(tower.prompts) :]))


def data(n: int, words: int) -> ClampData:
    """Random images and sentences, each with one of its own."""
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    texts = [f"picture {i}: " + " ".join(draw.choices(WORDS.split(), k=words)) for i in range(n)]
    return ClampData(
        image_features=unit(torch.randn(n, WIDTH, generator=generator)),
        texts=texts,
        teacher=unit(torch.randn(n, WIDTH, generator=generator)),
        teacher_scale=100.0,
        image_texts=torch.arange(n),
        group_texts=[[] for _ in range(n)],
        class_texts=[[0], [1]],
        pseudo_labels=torch.zeros(n, dtype=torch.int64),
    )


def method(kind: type[Clamp], parts: tuple[Any, Any], options: argparse.Namespace, n: int, **settings: Any) -> Clamp:
    """A fresh run over n pairs, all of them in each batch."""
    cfg = ClampSettings(
        prompts=options.prompts,
        wrapper=options.wrapper,
        batch_size=n,
        steps=options.steps,
        class_share=0,
        lora_lr=options.lora_lr,
        **settings,
    )
    return kind(ClampTower(*parts, cfg, WIDTH), data(n, options.words))


def speed(options: argparse.Namespace, parts: tuple[Any, Any]) -> None:
    """Steps per second, best step of each way, the ways taking turns."""
    n = options.batch
    ways: list[tuple[str, type[Clamp], dict[str, Any]]] = [
        ("kept", Clamp, {}),
        ("read at each step", Clamp, {"cache_gb": 0}),
        ("one pass", OnePass, {}),
    ]
    found = {}
    settings = TrainingSettings(micro_batch=options.micro_batch)
    for name, kind, changes in ways:
        run, ends = method(kind, parts, options, n, **changes), [time.perf_counter()]
        train(run, settings, on_step=lambda *_, ends=ends: ends.append(time.perf_counter()))
        # Its first step reads the texts that it keeps.
        found[name] = min(b - a for a, b in itertools.pairwise(ends[1:]))
    tokens = run.lengths.float().mean()
    sys.stdout.write(
        f"batch {n}, micro-batch {options.micro_batch}, {tokens:.0f} tokens for a text, {options.prompts} prompts, "
        f"{torch.get_num_threads()} thread(s)\n"
    )
    for name, seconds in found.items():
        sys.stdout.write(f"{name:20} {1 / seconds:8.3f} steps/s   kept is {seconds / found['kept']:.2f}x as fast\n")


def memory(options: argparse.Namespace, parts: tuple[Any, Any]) -> None:
    """Peak memory of one step."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = method(Clamp, parts, options, options.memory, cache_gb=options.cache_gb)
    began = time.perf_counter()
    train(run, TrainingSettings(micro_batch=options.micro_batch))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sys.stdout.write(
        f"batch {options.memory}, micro-batch {options.micro_batch}, {run.lengths.float().mean():.0f} tokens, "
        f"{options.prompts} prompts: peak {peak / 2**20:.2f} GiB ({before / 2**20:.2f} after loading), "
        f"{(time.perf_counter() - began) / options.steps:.0f} s a step\n"
    )


def generation(options: argparse.Namespace, parts: tuple[Any, Any]) -> None:
    """What a model with trained LoRA writes."""
    run = method(Clamp, parts, options, options.batch, lora_rank=16)
    tower = run.tower

    def told(*, lora: bool) -> tuple[list[str], float]:
        ids = torch.tensor([parts[1](PROSE)["input_ids"]])
        tower.eval()
        with contextlib.nullcontext() if lora else tower.without_lora(), torch.no_grad():
            perplexity = float(tower.lm(input_ids=ids, labels=ids).loss.exp())
        return [tower.generate(prompt, tokens=16, lora=lora) for prompt in PROMPTS], perplexity

    before, perplexity = told(lora=False)
    run.tower.train()
    history = train(run)
    sys.stdout.write(f"{run.n_steps} steps, loss {history[0]['loss']:.3f} to {history[-1]['loss']:.3f}\n")
    for name, lora in (("off", False), ("on", True)):
        after, found = told(lora=lora)
        same = sum(a == b for a, b in zip(before, after, strict=True))
        sys.stdout.write(
            f"LoRA {name}: {same} of {len(PROMPTS)} texts as before, perplexity {found:.4f} ({perplexity:.4f} before)\n"
        )
    for prompt, was, now in zip(PROMPTS, before, after, strict=True):
        sys.stdout.write(f"{prompt!r}\n  before {was!r}\n  on     {now!r}\n")


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", default="embedded")
    parser.add_argument("--words", type=int, default=25)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--wrapper", default="attributes")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--memory", type=int, help="measure the memory of a batch of so many instead")
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--cache-gb", type=float, default=2.0)
    parser.add_argument("--generate", action="store_true", help="train with LoRA and compare what is written instead")
    parser.add_argument("--lora-lr", type=float, default=1e-4)
    options = parser.parse_args()
    parts = lm.load(ClampSettings(lm=options.lm))
    (memory if options.memory else generation if options.generate else speed)(options, parts)


if __name__ == "__main__":
    sys.exit(main())
