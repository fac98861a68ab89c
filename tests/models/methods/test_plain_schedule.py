"""What the product does once instead of again changes no number: each saving alone, all, and the product itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import open_clip
import pytest
import torch

from benchmarks.step import SAVINGS, Texts, plain_schedule
from latteflow.models.methods.adaptation import Adapted, TuneData
from latteflow.models.methods.latteclip import LatteClipSettings
from latteflow.models.methods.latteclip.tuning import LatteClip, tune
from latteflow.models.settings import TrainingSettings

pytestmark = pytest.mark.slow

MODEL: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "patch_size": 16, "head_width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
CLASSES = ["an annual crop field", "a forest", "a river in the green"]
N = 14


@pytest.fixture(scope="module")
def clip() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return open_clip.CLIP(**MODEL).double().eval()


def domain() -> tuple[LatteClipSettings, TuneData, Texts, Any]:
    tokenize = open_clip.get_tokenizer("ViT-B-32")
    draws = torch.Generator().manual_seed(0)
    images = torch.randn((N, 3, 32, 32), generator=draws, dtype=torch.float64)
    z = torch.arange(N) % 3
    groups = [f"{name} and more of it, seen from far above" for name in CLASSES]
    texts = Texts(
        classes=[f"a satellite photo of {name}." for name in CLASSES],
        images=[f"picture {i} shows {CLASSES[i % 3]} {'very ' * (i % 4)}clearly" for i in range(N)],
        groups=[groups[label] for label in z],
    )

    def pixels(rows: torch.Tensor, seeds: torch.Tensor | None) -> torch.Tensor:
        assert seeds is not None
        return images[rows] + (seeds % 1009 / 1009).double()[:, None, None, None]

    data = TuneData(
        pseudo_labels=z, class_texts=tokenize(texts.classes), image_texts=tokenize(texts.images),
        group_texts=tokenize(groups), group_classes=torch.arange(3), pixels=pixels,
    )  # fmt: skip
    cfg = LatteClipSettings(train="all", batch_size=5, epochs=2, lr=1e-3, warmup=2, scale=None, alpha=0.2)
    return cfg, data, texts, tokenize


def plain(clip: torch.nn.Module, savings: tuple[str, ...]) -> Adapted:
    cfg, data, texts, tokenize = domain()
    drawn = LatteClip(cfg, data, clip=clip)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in drawn.batches():
            rows = batch.inputs["images"]
            yield rows[:, 0], rows[:, 1]

    return plain_schedule(
        cfg, data, texts, tokenize, clip, batches=batches(), n_steps=drawn.n_steps,
        steps_per_epoch=drawn.steps_per_epoch, learning_rate=drawn.learning_rate, savings=savings,
    )  # fmt: skip


def same(one: Adapted, two: Adapted) -> None:
    assert one.clip is not None and two.clip is not None
    torch.testing.assert_close(one.prototypes, two.prototypes, rtol=0, atol=1e-6)
    for (name, a), b in zip(one.clip.state_dict().items(), two.clip.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("savings", [*[(name,) for name in SAVINGS], tuple(SAVINGS)])
def test_a_saving_changes_no_number(clip: torch.nn.Module, savings: tuple[str, ...]) -> None:
    same(plain(clip, savings), plain(clip, ()))


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_product_is_the_plain_schedule(clip: torch.nn.Module, micro_batch: int | None) -> None:
    cfg, data, _, _ = domain()
    found, expected = tune(cfg, data, TrainingSettings(micro_batch=micro_batch), clip=clip), plain(clip, ())
    same(found, expected)
    per_epoch = [sum(entry["loss"] for entry in expected.history[i : i + 3]) / 3 for i in (0, 3)]
    assert [entry["loss"] for entry in found.history] == pytest.approx(per_epoch, abs=1e-6)
    before = clip.state_dict()["visual.proj"]
    assert (found.clip.state_dict()["visual.proj"] - before).abs().max() > 1e-4  # it did learn


def test_texts_of_a_frozen_tower_may_be_cached(clip: torch.nn.Module) -> None:
    cfg, data, _, _ = domain()
    frozen = cfg.model_copy(update={"text_tower": "frozen"})
    with torch.no_grad():
        embeds = {name: clip.encode_text(getattr(data, name)) for name in ("class_texts", "image_texts", "group_texts")}
    cached, read = tune(frozen, replace(data, **embeds), clip=clip), tune(frozen, data, clip=clip)
    same(cached, read)
    slow = tune(cfg.model_copy(update={"lr": 0.0}), data, clip=clip)  # a trainable tower that does not move
    still = tune(frozen.model_copy(update={"lr": 0.0}), data, clip=clip)
    same(slow, still)
