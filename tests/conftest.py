"""Shared fixtures: a tiny CLIP made on the spot, and a small folder of pictures."""

import json
import sys
from pathlib import Path

import hypothesis
import pytest
from PIL import Image, ImageDraw

from latteflow.tasks.core.domain import Domain

# Machines that run tests are shared; a slow example is no failure.
hypothesis.settings.register_profile("shared", deadline=None)
hypothesis.settings.load_profile("shared")

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 220)}


def make_tiny_clip(folder: Path) -> None:
    """A ViT of open_clip's own classes with random weights, saved as an open_clip folder."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    # Room for texts about two pictures; what it makes of shorter ones stays the same.
    state, config["text_cfg"]["context_length"] = model.state_dict(), 40
    state["positional_embedding"] = torch.cat([state["positional_embedding"], 0.01 * torch.randn(16, 32)])
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {"size": 32}}))


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip folder, see :func:`make_tiny_clip`."""
    folder = tmp_path_factory.mktemp("tiny_clip")
    make_tiny_clip(folder)
    return folder


@pytest.fixture(scope="session")
def exported(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as `latteflow export` writes it, with a centre, two classes and a map."""
    import torch

    from latteflow.models.settings import ClipSettings
    from latteflow.models.ship.export import export
    from latteflow.models.towers import clip

    folder = tmp_path_factory.mktemp("exported") / "model"
    generator = torch.Generator().manual_seed(0)
    model = clip.read(ClipSettings(model=str(tiny_clip)))
    export(
        model,
        folder,
        classes=["red", "blue"],
        prototypes=torch.nn.functional.normalize(torch.randn(2, model.dim, generator=generator)),
        centre=0.1 * torch.randn(model.dim, generator=generator),
        scale=20.0,
        resize="pad",
        unknown_below=0.05,
        image_map=torch.eye(model.dim) + 0.1 * torch.randn(model.dim, model.dim, generator=generator),
    )
    return folder


def draw(number: int, colour: str) -> Image.Image:
    """A picture that belongs to a colour and is unlike the others."""
    image = Image.new("RGB", (40, 32), "white")
    shape = (2 + number % 9, 3 + number % 7, 20 + number % 13, 18 + number % 11)
    (ImageDraw.Draw(image).ellipse if number % 2 else ImageDraw.Draw(image).rectangle)(shape, fill=COLOURS[colour])
    image.putpixel((number % 40, number // 40), (number % 256, 0, 0))
    return image


def draw_folder(folder: Path, count: int, first: int = 0) -> dict[str, str]:
    """Pictures in a folder; returns path -> colour."""
    folder.mkdir(parents=True, exist_ok=True)
    truth = {}
    for number in range(first, first + count):
        colour = list(COLOURS)[number % 3]
        draw(number, colour).save(folder / f"{number:03d}.png")
        truth[f"{number:03d}.png"] = colour
    return truth


@pytest.fixture
def domain(tmp_path: Path, tiny_clip: Path) -> Domain:
    """A whole domain of 24 + 12 pictures with labels and sidecar texts, that runs in a few seconds."""
    train = draw_folder(tmp_path / "train", 24)
    test = draw_folder(tmp_path / "test", 12, first=100)
    (tmp_path / "labels.csv").write_text(
        "path,class\n" + "".join(f"test/{path},{name}\n" for path, name in test.items())
    )
    (tmp_path / "texts.csv").write_text(
        "path,text\n" + "".join(f"train/{path},a {name} shape number {path[:3]}\n" for path, name in train.items())
    )
    (tmp_path / "domain.yaml").write_text(
        f"""\
name: shapes
source: train
classes: [red, green, blue]
templates: ["a {{}} shape."]
evaluation: {{source: test, labels: labels.csv}}
clip: {{model: {tiny_clip}, resize: pad, centre: false}}
describer: {{kind: sidecar, texts: texts.csv}}
method: [latteclip]
latteclip: {{epochs: 2, batch_size: 8}}
seeds: [0, 1]
shard: {{images: 10}}
store: store
output: runs
"""
    )
    return Domain.load(tmp_path / "domain.yaml")


def call(*arguments: object) -> int:
    """The command line in this process; returns its exit code."""
    from latteflow.flows.cli import entry

    before, sys.argv = sys.argv, ["latteflow", *map(str, arguments)]
    try:
        entry()
    except SystemExit as done:
        return int(done.code or 0)
    finally:
        sys.argv = before
    return 0
