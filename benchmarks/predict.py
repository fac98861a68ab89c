"""`latteflow predict` beside the plain zero-shot loop of open_clip, from folder to answers.

    python -m benchmarks.predict [--model ViT-S-32] [--small 1024] [--large 96] [--rounds 2]

One model with random weights, exported; JPEGs of 320 x 240 and of 4000 x 3000, made on the spot. The
plain loop is that of the README of open_clip: open, preprocess, stack, encode, softmax. Both have one batch, the same
number of threads for the model, take turns, and begin with loading it; ours also looks at each image in a process of
its own, hashes its file and writes a table. Processor time is that of all processes, the same on a busy machine.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import polars as pl
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from latteflow.models.ship.export import export
from latteflow.models.towers.clip import Clip
from latteflow.tasks.ship.predict import predict

BATCH, CLASSES = 64, 100
_DISTINCT = 16


def main() -> None:
    """Print a line for each size."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="ViT-S-32")
    options.add_argument("--small", type=int, default=1024)
    options.add_argument("--large", type=int, default=96)
    options.add_argument("--rounds", type=int, default=2)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        export_random(chosen.model, folder / "model")
        for name, count, size in (("small", chosen.small, (320, 240)), ("large", chosen.large, (4000, 3000))):
            photos(folder / name, count, size)
            took: dict[str, list[np.ndarray]] = {"plain": [], "ours": []}
            for _ in range(chosen.rounds):
                begin = clocks()
                theirs = plain(folder / "model", folder / name)
                took["plain"].append(clocks() - begin)
                begin = clocks()
                predict(folder / "model", str(folder / name), str(folder / "out.parquet"), batch=BATCH)
                took["ours"].append(clocks() - begin)
            ours = pl.read_parquet(folder / "out.parquet")
            same = np.mean([a == b for a, b in zip(ours["class"].to_list(), theirs["class"], strict=True)])
            moved = np.abs(ours["probability"].to_numpy() - theirs["probability"]).max()
            (plain_s, plain_cpu), (ours_s, ours_cpu) = (np.median(each, axis=0) for each in took.values())
            sys.stdout.write(
                f"{name}: {count} images of {size[0]} x {size[1]}, plain {plain_s:.1f} s, ours {ours_s:.1f} s, ratio "
                f"{plain_s / ours_s:.2f}; processor {plain_cpu:.1f} s and {ours_cpu:.1f} s, ratio "
                f"{plain_cpu / ours_cpu:.2f}; same class {same:.1%}, largest change of a probability {moved:.4f}\n"
            )


def clocks() -> np.ndarray:
    """Seconds on the wall, and of processor time of this process and those it has ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return np.array([time.perf_counter(), sum(each.ru_utime + each.ru_stime for each in used)])


def export_random(name: str, folder: Path) -> None:
    """A model with random weights and random classes, as `latteflow export` writes it."""
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    dim = open_clip.get_model_config(name)["embed_dim"]
    clip = Clip(name, model.eval(), open_clip.get_tokenizer(name), preprocess, dim)
    export(
        clip, folder, classes=[f"class {number}" for number in range(CLASSES)],
        prototypes=F.normalize(torch.randn(CLASSES, dim)), centre=torch.zeros(dim), scale=100.0, resize="crop",
        unknown_below=0.0,
    )  # fmt: skip


def photos(folder: Path, count: int, size: tuple[int, int]) -> None:
    """JPEGs with as much detail as photographs have, one to two bits a pixel; some of them again and again."""
    folder.mkdir()
    random = np.random.default_rng(0)
    base = Image.effect_mandelbrot(size, (-2, -1.2, 0.8, 1.2), 100).convert("RGB")
    for number in range(min(count, _DISTINCT)):
        coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        fine = Image.fromarray(random.integers(0, 256, (size[1] // 2, size[0] // 2, 3), np.uint8)).resize(size)
        Image.blend(Image.blend(coarse, base, 0.4), fine, 0.12).save(folder / f"{number:04d}.jpg", quality=88)
    for number in range(_DISTINCT, count):
        shutil.copy(folder / f"{number % _DISTINCT:04d}.jpg", folder / f"{number:04d}.jpg")


def plain(model: Path, folder: Path) -> dict[str, list[str] | np.ndarray]:
    """Class and probability of each image, as open_clip's README has it, with the classifier of the folder."""
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{model}")
    clip.eval()
    classifier = load_file(model / "classifier.safetensors")["prototypes"].T
    paths = sorted(folder.iterdir())
    found = []
    with torch.no_grad():
        for start in range(0, len(paths), BATCH):
            batch = torch.stack([preprocess(Image.open(path)) for path in paths[start : start + BATCH]])
            features = F.normalize(clip.encode_image(batch), dim=-1)
            found.append((100.0 * features @ classifier).softmax(dim=-1))
    best = torch.cat(found).max(dim=-1)
    return {"class": [f"class {number}" for number in best.indices.tolist()], "probability": best.values.numpy()}


if __name__ == "__main__":
    main()
