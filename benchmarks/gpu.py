"""What a GPU makes of the product: images embedded, training steps beside the plain schedule, transduction, CLAMP.

    python -m benchmarks.gpu [--parts embed towers step transduction clamp] [--minutes 8]
    python -m benchmarks.gpu --toy       # the same parts in toy size, on a GPU or without one

Random weights of real size, ViT-B-32 and ViT-L-14; nothing is downloaded. Each line says what it is of; memory is the
most that PyTorch held on the GPU, and is not told of a processor. A part that begins too late is left out, and so is a
measurement for which the GPU has no room; both are said. Without a GPU, and without `--toy`, nothing is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import open_clip
import torch

TOY_MODEL: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
STEPS = 6
"""Of which the first, that also fills caches and compiles, is not counted."""


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        models: open_clip's configuration of each, and the images in a step of training.
        photos: how many are embedded, and how large they are.
        pairs: of a step of CLAMP, its micro-batch, and the configuration of its language model.
        transduction: images, classes, width.
    """

    models: dict[str, tuple[dict[str, Any], int]]
    photos: tuple[int, tuple[int, int]]
    pairs: tuple[int, int, dict[str, int]]
    transduction: tuple[int, int, int]


def sizes(*, toy: bool) -> Size:
    """Toy or real."""
    if toy:
        lm = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        lm["num_key_value_heads"] = 2
        return Size({"toy": (TOY_MODEL, 4)}, (12, (64, 48)), (4, 2, lm), (200, 5, 16))
    models = {name: (open_clip.get_model_config(name), batch) for name, batch in (("ViT-B-32", 512), ("ViT-L-14", 128))}
    # As wide and deep as models of half a billion parameters are.
    lm = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    lm["num_key_value_heads"] = 2
    return Size(models, (4096, (500, 375)), (256, 64, lm), (1_000_000, 1000, 512))


def say(line: str) -> None:
    """At once, as the run may be cut."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def measured(what: str, device: torch.device) -> Iterator[Callable[[str], None]]:
    """Says a line with the most memory that was held; that there is no room for it, where there is none."""
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    found: list[str] = []
    try:
        yield found.append
    except torch.OutOfMemoryError:
        found.append("does not fit into the GPU")
    peak = f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if gpu else ""
    say(f"{what}: {'; '.join(found)}{peak}")


def synchronized(device: torch.device) -> float:
    """Seconds, once all that was asked for is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def embed(size: Size, device: torch.device) -> None:
    """From JPEG shards to features, the stage as it is."""
    from safetensors.torch import save_file

    from benchmarks.predict import photos
    from latteflow.models.towers import clip
    from latteflow.tasks.core.domain import Domain
    from latteflow.tasks.core.stage import rules
    from latteflow.tasks.ingest import embed as stage
    from latteflow.tasks.ingest.shard import shard

    count, side = size.photos
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        photos(folder / "photos", count, side)
        for name, (config, _) in size.models.items():
            (folder / name).mkdir()
            about = {"model_cfg": config, "preprocess_cfg": {}}
            (folder / name / "open_clip_config.json").write_text(json.dumps(about))
            save_file(open_clip.CLIP(**config).state_dict(), folder / name / "open_clip_model.safetensors")
            file = folder / f"{name}.yaml"
            file.write_text(
                f"name: photos\nsource: photos\nclasses: [one, two]\nclip: {{model: ./{name}}}\nstore: store\n"
                "embed: {batch: 256}\n"
            )
            domain = Domain.load(file)
            shards = shard(domain, "train")
            clip.load(domain.clip)
            with measured(f"embed {name}, {count} JPEGs of {side[0]} x {side[1]}", device) as tell:
                for _ in range(2):  # the first time warms up
                    begin = synchronized(device)
                    with rules(refresh=["embed"]):
                        stage.embed(domain, shards)
                    took = synchronized(device) - begin
                tell(f"{count / took:.0f} images/s")
            clip.load.cache_clear()


def towers(size: Size, device: torch.device) -> None:
    """Image towers alone, on pixels that are there: what decoding, copying and the stage can take of it."""
    for name, (config, batch) in size.models.items():
        side = config["vision_cfg"].get("image_size", 224)
        pixels = torch.randn(batch, 3, side, side, device=device)
        for kind in ("float32", "bfloat16", "bfloat16, compiled"):
            tower = open_clip.CLIP(**config).visual.eval().to(device)
            if "compiled" in kind:
                if device.type != "cuda":
                    say(f"tower {name}, {kind}: only on a GPU")
                    continue
                tower.compile()
            autocast = torch.autocast(device.type, torch.bfloat16, enabled="bfloat16" in kind)
            with measured(f"tower {name}, {kind}, {batch} images", device) as tell, torch.inference_mode(), autocast:
                tower(pixels)
                ends = [synchronized(device)]
                for _ in range(STEPS):
                    tower(pixels)
                    ends.append(synchronized(device))
                tell(f"{batch / statistics.median(b - a for a, b in pairwise(ends)):.0f} images/s")


def step(size: Size, device: torch.device) -> None:
    """LatteCLIP's steps, `all` and `last_blocks`, beside the plain schedule."""
    from benchmarks.step import domain, plain, product
    from latteflow.models.settings import TrainingSettings

    exact, half = TrainingSettings(), TrainingSettings(precision="bfloat16")
    for name, (config, batch) in size.models.items():
        side = config["vision_cfg"].get("image_size", 224)
        for trained in ("all", "last_blocks"):
            work = domain(batch * STEPS, batch, trained, side)  # type: ignore[arg-type]
            ways: dict[str, Callable[[Any, Any], None]] = {
                "plain schedule": lambda clip, ended, work=work: plain(work, clip, [], ended),
                "product": lambda clip, ended, work=work: product(work, clip, exact, ended),
                "product, micro-batches of a quarter": lambda clip, ended, work=work, batch=batch: product(
                    work, clip, TrainingSettings(micro_batch=max(1, batch // 4)), ended
                ),
                "product, bfloat16": lambda clip, ended, work=work: product(work, clip, half, ended),
            }
            if device.type == "cuda":
                ways["product, bfloat16, compiled"] = lambda clip, ended, work=work: product(
                    work, clip, half, ended, lambda method: method.clip.visual.compile()
                )
            first: float | None = None
            for way, go in ways.items():
                torch.manual_seed(0)
                clip, ends = open_clip.CLIP(**config).to(device), list[float]()
                with measured(f"step {name}, {trained}, batch {batch}, {way}", device) as tell:
                    go(clip, lambda *_, ends=ends: ends.append(synchronized(device)))
                    seconds = statistics.median(b - a for a, b in pairwise(ends))
                    first = first or seconds
                    tell(f"{seconds:.3f} s, {first / seconds:.2f} times as fast as the first")
                del clip


def transduction(size: Size, device: torch.device) -> None:
    """All images of a domain together: neighbours, then classes."""
    from latteflow.models.methods.transduction import TransductionSettings
    from latteflow.models.methods.transduction.tuning import nearest, transduce
    from latteflow.models.vectors import unit

    n, classes, width = size.transduction
    draws = torch.Generator(device).manual_seed(0)
    texts = unit(torch.randn(classes, width, device=device, generator=draws))
    of = torch.randint(classes, (n,), device=device, generator=draws)
    images = unit(texts[of] + 2 * unit(torch.randn(n, width, device=device, generator=draws)))
    cfg, what = TransductionSettings(), f"transduction, {n} images, {classes} classes, {width} wide"
    with measured(f"{what}, neighbours", device) as tell:
        begin = synchronized(device)
        near = nearest(images, cfg.neighbours)
        tell(f"{synchronized(device) - begin:.1f} s")
    with measured(f"{what}, the rest", device) as tell:
        begin = synchronized(device)
        found = transduce(cfg, images, texts, 100.0, near=near)
        tell(f"{synchronized(device) - begin:.1f} s, {found.steps} rounds")


def clamp(size: Size, device: torch.device) -> None:
    """CLAMP's step: keys and values kept, read at each step, and text and prompts in one pass."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.clamp import speed

    batch, micro, shape = size.pairs
    with measured(f"clamp, {shape['num_hidden_layers']} layers of {shape['hidden_size']}", device) as tell:
        lm = LlamaForCausalLM(LlamaConfig(vocab_size=258, max_position_embeddings=1024, **shape)).to(device).eval()
        options = Namespace(
            batch=batch, micro_batch=micro, steps=4, words=12, prompts=24, wrapper="attributes", lora_lr=1e-4,
        )  # fmt: skip
        speed(options, (lm, letters()))
        tell("the most of the three")


def letters() -> Any:
    """A tokenizer that takes letters for tokens, as there is none without a download."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    found = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(known)}, merges=[]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=found, bos_token="<s>", eos_token="</s>")


PARTS: dict[str, Callable[[Size, torch.device], None]] = {
    "step": step,
    "embed": embed,
    "towers": towers,
    "clamp": clamp,
    "transduction": transduction,
}


def main(arguments: list[str] | None = None) -> None:
    """Print lines."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--minutes", type=float, default=8.0, help="no part begins when three quarters are over")
    options.add_argument("--toy", action="store_true")
    chosen = options.parse_args(arguments)
    if not (chosen.toy or torch.cuda.is_available()):
        say("no GPU: nothing is measured; --toy shows that it runs")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    say(f"{name}, PyTorch {torch.__version__}{', toy size' if chosen.toy else ''}")
    begun = time.monotonic()
    for part in chosen.parts:
        if time.monotonic() - begun > 45 * chosen.minutes:
            say(f"{part}: left out, as {chosen.minutes:g} minutes are nearly over")
            continue
        PARTS[part](sizes(toy=chosen.toy), device)
    say(f"{time.monotonic() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
