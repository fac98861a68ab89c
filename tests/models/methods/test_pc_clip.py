"""PC-CLIP in training: what it changes and what not, and a run that learns what differences mean."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from latteflow.models.methods.adaptation import PairData, TuneData
from latteflow.models.methods.pc_clip import PcClipSettings
from latteflow.models.methods.pc_clip.comparative import compare_prompts, difference_accuracy, difference_scores
from latteflow.models.methods.pc_clip.tuning import PcClip, difference, pair_loss, tune_pairs
from latteflow.models.methods.training import train
from latteflow.models.settings import ClipSettings
from latteflow.models.towers import clip as clips
from latteflow.models.vectors import unit

N_ATTRIBUTES, WIDTH = 12, 32


class Bag(nn.Module):
    """A text tower: the mean of its words' vectors, behind what looks like a block of a CLIP."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        block = nn.Embedding(2 * N_ATTRIBUTES + 1, WIDTH, padding_idx=0)
        block.weight.data = torch.randn(block.weight.shape, generator=generator)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList([block])
        self.logit_scale = nn.Parameter(torch.tensor(0.0))

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        words = self.transformer.resblocks[0](tokens)  # type: ignore[union-attr, operator]
        return (words * (tokens > 0)[..., None]).sum(1)


def attributes(seed: int, n: int) -> tuple[Tensor, PairData]:
    """Images with 12 attributes each, seen by an encoder that is fixed, and texts "the first has k, the second j"."""
    encoder = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(N_ATTRIBUTES, WIDTH, generator=encoder), torch.randn(WIDTH, generator=encoder)
    draws = torch.Generator().manual_seed(seed)
    has = torch.randint(2, (n, N_ATTRIBUTES), generator=draws)
    first, second = (torch.randint(n, (2000,), generator=draws) for _ in range(2))
    texts = torch.zeros(2000, 2 * N_ATTRIBUTES, dtype=torch.int64)
    for row, (a, b) in enumerate(zip(has[first], has[second], strict=True)):
        words = [1 + k for k in range(N_ATTRIBUTES) if a[k] > b[k]]
        words += [1 + N_ATTRIBUTES + k for k in range(N_ATTRIBUTES) if b[k] > a[k]]
        texts[row, : len(words)] = torch.tensor(words, dtype=torch.int64)
    different = (has[first] != has[second]).any(1)
    return unit(has.float() @ weight + bias), PairData(
        first=first[different], second=second[different], texts=texts[different]
    )


def accuracy(method: PcClip, images: Tensor, pairs: PairData) -> float:
    texts = method.features(pairs.texts).numpy()
    return difference_accuracy(difference_scores(images[pairs.first].numpy(), images[pairs.second].numpy(), texts))


def test_a_short_run_learns_what_differences_mean() -> None:
    images, pairs = attributes(1, 200)
    held_out = attributes(2, 200)
    tower = Bag(torch.Generator().manual_seed(3))
    cfg = PcClipSettings(train="blocks", lr=0.02, batch_size=64, epochs=3, decay=1.0)
    method = PcClip(cfg, images, pairs, clip=tower)
    before = accuracy(method, *held_out)
    history = train(method)
    after = accuracy(method, *held_out)
    assert 0.3 < before < 0.7 and after >= 0.95
    assert history[-1]["cosine"] > history[0]["cosine"] and history[-1]["pair_loss"] < history[0]["pair_loss"]
    swapped = PairData(first=held_out[1].second, second=held_out[1].first, texts=held_out[1].texts)
    assert accuracy(method, held_out[0], swapped) <= 0.05


@given(st.integers(0, 100), st.floats(0.1, 10))
def test_the_loss_knows_neither_lengths_nor_the_order_of_pairs(seed: int, length: float) -> None:
    draws = torch.Generator().manual_seed(seed)
    first, second, texts = torch.randn(3, 6, 5, generator=draws, dtype=torch.float64)
    loss = pair_loss(difference(first, second), texts)
    torch.testing.assert_close(pair_loss(difference(length * first, second / length), texts * length), loss)
    order = torch.randperm(6, generator=draws)
    torch.testing.assert_close(pair_loss(difference(first[order], second[order]), texts[order]), loss)


def tiny(tiny_clip: Path) -> clips.Clip:
    return clips.load(ClipSettings(model=str(tiny_clip)))


def texts_and_pairs(model: clips.Clip) -> tuple[Tensor, PairData]:
    draws = torch.Generator().manual_seed(0)
    images = unit(torch.randn(12, model.dim, generator=draws))
    shown = ["a dog", "two cats", "red", "a big tree", "it"]
    texts = model.tokenizer([f"the first image shows {word}" for word in shown])
    first = torch.arange(10)
    return images, PairData(first=first, second=(first + 1) % 12, texts=texts[first % 5])


@pytest.mark.parametrize(("train_what", "blocks"), [("blocks", {"0", "1"}), ("last_blocks", {"1"})])
def test_only_the_blocks_of_the_text_tower_change(tiny_clip: Path, train_what: Any, blocks: set[str]) -> None:
    model = tiny(tiny_clip)
    before = copy.deepcopy(model.model.state_dict())
    images, pairs = texts_and_pairs(model)
    data = TuneData(
        pseudo_labels=torch.zeros(12, dtype=torch.int64), class_texts=model.tokenizer(["red", "blue"]),
        image_embeds=images, pairs=pairs,
    )  # fmt: skip
    cfg = PcClipSettings(train=train_what, n_blocks=1, lr=1e-3, batch_size=4, epochs=2)
    found = tune_pairs(cfg, data, clip=model.model)
    assert found.clip is not None and found.text_map is None and len(found.history) == 2
    changed = {name for name, t in found.clip.state_dict().items() if not t.equal(before[name])}
    assert changed and all(name.startswith("transformer.resblocks.") for name in changed)
    assert {name.split(".")[2] for name in changed} == blocks
    assert all(t.equal(before[name]) for name, t in model.model.state_dict().items())
    texts = found.clip.encode_text(model.tokenizer(["red", "blue"]))
    torch.testing.assert_close(found.prototypes, unit(texts.detach()))


def test_weights_are_averaged(tiny_clip: Path) -> None:
    model = tiny(tiny_clip)
    images, pairs = texts_and_pairs(model)
    data = TuneData(
        pseudo_labels=torch.zeros(12, dtype=torch.int64), class_texts=model.tokenizer(["red", "blue"]),
        image_embeds=images, pairs=pairs,
    )  # fmt: skip
    cfg = PcClipSettings(train="blocks", lr=1e-3, batch_size=4, epochs=1)
    whole, half = (
        tune_pairs(cfg.model_copy(update={"averaging": share}), data, clip=model.model).clip for share in (1.0, 0.5)
    )
    assert whole is not None and half is not None
    for name, t in model.model.named_parameters():
        torch.testing.assert_close(half.get_parameter(name), (t + whole.get_parameter(name)) / 2)


def projected(**changes: Any) -> tuple[PcClipSettings, TuneData]:
    draws = torch.Generator().manual_seed(0)
    images, texts = torch.randn(20, 6, generator=draws), unit(torch.randn(30, 6, generator=draws))
    first = torch.randint(20, (30,), generator=draws)
    pairs = PairData(first=first, second=(first + 1 + torch.arange(30) % 18) % 20, texts=texts)
    data = TuneData(
        pseudo_labels=torch.zeros(20, dtype=torch.int64), class_texts=unit(torch.randn(3, 2, 6, generator=draws)),
        image_embeds=images, centre=images.mean(0), pairs=pairs,
    )  # fmt: skip
    return PcClipSettings(train="projection", batch_size=8, epochs=3, lr=1e-2, **changes), data


def test_a_projection_is_a_map_behind_the_texts() -> None:
    cfg, data = projected()
    found = tune_pairs(cfg, data)
    assert found.clip is None and found.text_map is not None
    expected = unit(unit(data.class_texts @ found.text_map).mean(1))
    torch.testing.assert_close(found.prototypes, expected)
    assert found.history[-1]["cosine"] > found.history[0]["cosine"]
    again, other = tune_pairs(cfg, data), tune_pairs(cfg, data, seed=1)
    assert again.prototypes.equal(found.prototypes) and not other.prototypes.equal(found.prototypes)
    half = tune_pairs(cfg.model_copy(update={"averaging": 0.5}), data)
    torch.testing.assert_close(half.text_map, (found.text_map + torch.eye(6)) / 2)


def test_texts_about_classes_correct_the_classifier() -> None:
    cfg, data = projected()
    assert data.pairs is not None
    plain = tune_pairs(cfg, data)
    about = torch.tensor([[0, 1], [1, 0]])
    texts = unit(torch.randn(2, 6, generator=torch.Generator().manual_seed(5)))
    pairs = PairData(
        first=data.pairs.first, second=data.pairs.second, texts=data.pairs.texts, class_pairs=about, class_texts=texts
    )
    found = tune_pairs(cfg, TuneData(**{**vars(data), "pairs": pairs}))
    expected = compare_prompts(plain.prototypes.numpy(), [(0, 1), (1, 0)], (texts @ plain.text_map).numpy())
    np.testing.assert_allclose(found.prototypes, expected, atol=1e-6)
    assert found.prototypes[2].equal(plain.prototypes[2]) and not found.prototypes[1].equal(plain.prototypes[1])


def test_pairs_of_the_same_image_are_left_out() -> None:
    cfg, data = projected()
    assert data.pairs is not None
    images = data.image_features.clone()
    images[1] = images[0]
    pairs = PairData(first=torch.tensor([0, 2, 4]), second=torch.tensor([1, 3, 5]), texts=data.pairs.texts[:3])
    assert PcClip(cfg, images, pairs).first.tolist() == [2, 4]
    with pytest.raises(ValueError, match="1 of 2 pairs are of different images; at least 2"):
        PcClip(cfg, images, PairData(first=pairs.first[:2], second=pairs.second[:2], texts=pairs.texts[:2]))


def test_what_is_missing_is_told() -> None:
    cfg, data = projected()
    with pytest.raises(ValueError, match="pc_clip needs texts about pairs"):
        tune_pairs(cfg, TuneData(**{**vars(data), "pairs": None}))
    with pytest.raises(ValueError, match="projection wants embeds"):
        tune_pairs(cfg.model_copy(update={"train": "blocks"}), data)
    tokens = PairData(
        first=torch.tensor([0, 1]), second=torch.tensor([2, 3]), texts=torch.ones(2, 4, dtype=torch.int64)
    )
    with pytest.raises(ValueError, match="need clip to read them"):
        PcClip(cfg.model_copy(update={"train": "blocks"}), data.image_features, tokens)
    with pytest.raises(ValueError, match="blocks of its text tower"):
        PcClip(cfg.model_copy(update={"train": "blocks"}), data.image_features, tokens, clip=nn.Linear(2, 2))
