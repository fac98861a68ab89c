"""The training engine: what is cut into parts, dealt to processes or gone on with ends as if it had been one piece."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from latteflow.models.methods.adaptation import TuneData
from latteflow.models.methods.latteclip import LatteClipSettings
from latteflow.models.methods.latteclip.tuning import LatteClip
from latteflow.models.methods.losses import clip_loss
from latteflow.models.methods.training import Batch, NonFiniteLossError, Trainable, train
from latteflow.models.settings import TrainingSettings
from latteflow.models.vectors import unit

N, DIM = 20, 6


class Pairs(Trainable):
    """Two towers on random rows, with dropout, a learned scale and a state; one tower has a frozen layer."""

    total: Tensor

    def __init__(self, *, dropout: float = 0.2, clip_norm: float = math.inf, bad_step: int | None = None) -> None:
        super().__init__()
        self.n_steps, self.steps_per_epoch, self.clip_norm, self.bad_step = 8, 4, clip_norm, bad_step
        self.seen: list[int] = []
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.x = {"images": torch.randn(N, DIM), "texts": torch.randn(N, DIM)}
            self.images = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh(), nn.Dropout(dropout), nn.Linear(DIM, DIM))
            self.texts = nn.Linear(DIM, DIM)
        self.images[0].requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("total", torch.zeros(()))

    def batches(self) -> Iterator[Batch]:
        draws = torch.Generator().manual_seed(0)
        for step in range(self.n_steps):
            rows = torch.randperm(N, generator=draws)[:11]
            yield Batch({"images": rows, "texts": rows}, step)

    def load(self, kind: str, rows: Tensor) -> Tensor:
        return self.x[kind][rows]

    def encode(self, kind: str, loaded: Tensor) -> Tensor:
        self.seen.append(len(loaded))
        return unit(getattr(self, kind)(loaded))

    def losses(self, features: Mapping[str, Tensor], about: Any) -> dict[str, Tensor]:
        loss = clip_loss(features["images"], features["texts"], self.scale.exp())
        return {"pair_loss": loss * math.nan if about == self.bad_step else loss}

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], weight_decay=0.1)

    def learning_rate(self, step: int) -> float:
        return 0.02 * (step + 1) / self.n_steps

    def after_step(self) -> Mapping[str, float]:
        self.total = self.total + self.scale.detach()
        return {"total": float(self.total)}


class Kept:
    """A checkpoint in memory that can pull the plug."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.data: bytes | None = None
        self.stop_at, self.writes = stop_at, 0

    def read(self) -> bytes | None:
        return self.data

    def write(self, data: bytes) -> None:
        self.data, self.writes = data, self.writes + 1
        if self.writes == self.stop_at:
            raise KeyboardInterrupt


def weights(method: Trainable) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in method.state_dict().items()}


def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor], atol: float = 0.0) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], two[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("stop_at", [1, 3, 4, 7])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_run_that_was_cut_inside_an_epoch_ends_with_the_same_bits(stop_at: int, ema: float | None) -> None:
    whole, cut, after = Pairs(), Pairs(), Pairs()
    expected = train(whole, TrainingSettings(ema=ema))
    kept = Kept(stop_at)
    with pytest.raises(KeyboardInterrupt):
        train(cut, TrainingSettings(ema=ema, checkpoint_s=0), checkpoint=kept)
    kept.stop_at = None
    history = train(after, TrainingSettings(ema=ema), checkpoint=kept)
    same(weights(after), weights(whole))
    assert history == expected and len(history) == 2
    assert len(after.seen) == 2 * (8 - stop_at)


@pytest.mark.parametrize("micro_batch", [1, 4, 11, 100])
def test_micro_batches_give_the_gradients_of_the_whole_batch(micro_batch: int) -> None:
    whole, parts = Pairs(dropout=0), Pairs(dropout=0)
    train(whole)
    train(parts, TrainingSettings(micro_batch=micro_batch))
    assert max(parts.seen) == min(micro_batch, 11) and max(whole.seen) == 11
    same(weights(parts), weights(whole), atol=1e-6)


def test_dropout_is_the_same_when_a_part_is_encoded_again() -> None:
    method = Pairs()
    drawn: list[Tensor] = []
    method.images[2].register_forward_hook(lambda module, args, out: drawn.append((out == 0).clone()))
    train(method, TrainingSettings(micro_batch=4))
    steps = [drawn[i : i + 5] for i in range(0, len(drawn), 5)]  # three parts, the first two of them twice
    assert len(steps) == 8 and all(step[0].equal(step[3]) and step[1].equal(step[4]) for step in steps)
    assert not steps[0][0].equal(steps[1][0])


def test_global_random_numbers_are_neither_used_nor_changed() -> None:
    one, two = Pairs(), Pairs()
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    train(one)
    assert state.equal(torch.random.get_rng_state())
    torch.manual_seed(2)
    train(two)
    same(weights(one), weights(two))
    other = Pairs()
    train(other, seed=1)
    assert not other.texts.weight.equal(one.texts.weight)


def test_a_loss_that_is_not_finite_stops_and_the_last_good_state_is_kept() -> None:
    good, kept = Pairs(), Kept()
    expected: dict[int, dict[str, Tensor]] = {}
    train(good, on_step=lambda done, total, stats: expected.update({done: weights(good)}))
    bad = Pairs(bad_step=5)
    with pytest.raises(NonFiniteLossError, match=r"step 5: pair_loss nan.*lower the learning rate") as caught:
        train(bad, checkpoint=kept)
    assert caught.value.step == 5 and len(caught.value.rows["images"]) == 11
    same(weights(bad), expected[5])
    again = Pairs()
    train(again, checkpoint=kept)  # whatever was wrong is mended: it goes on from the last good
    same(weights(again), weights(good))


def test_a_gradient_that_is_not_finite_stops_too() -> None:
    method = Pairs()
    method.texts.weight.register_hook(lambda gradient: gradient * math.inf)
    before = weights(method)
    with pytest.raises(NonFiniteLossError, match=r"step 0: .*gradient (nan|inf)"):
        train(method)
    same(weights(method), before)


def test_frozen_parameters_are_watched() -> None:
    method = Pairs()

    def disturb(*_: object) -> None:
        method.images[0].weight.data.add_(1e-3)

    method.texts.register_forward_pre_hook(disturb)
    with pytest.raises(AssertionError, match="frozen"):
        train(method)


def test_the_average_lies_between_the_parameters_of_the_run() -> None:
    plain, averaged = Pairs(dropout=0), Pairs(dropout=0)
    steps: list[Tensor] = []
    train(plain, on_step=lambda *_: steps.append(plain.texts.weight.detach().clone()))
    train(averaged, TrainingSettings(ema=0.5))
    mean = Pairs().texts.weight.detach().clone()
    for step, now in enumerate(steps, 1):
        mean = torch.lerp(mean, now, 1 - min(0.5, (1 + step) / (10 + step)))
    torch.testing.assert_close(averaged.texts.weight.detach(), mean)
    assert not torch.allclose(mean, steps[-1])


def test_long_gradients_are_cut() -> None:
    method = Pairs(clip_norm=1e-3)
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def seen(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.cat([g.reshape(-1) for g in gradients if g is not None]).norm()))
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", seen)
        train(method)
    assert len(norms) == 8 and max(norms) <= 1e-3 + 1e-6


def test_bfloat16_is_only_inside_the_towers() -> None:
    method = Pairs()
    kinds: list[torch.dtype] = []
    method.texts.register_forward_hook(lambda module, args, out: kinds.append(out.dtype))
    history = train(method, TrainingSettings(precision="bfloat16"))
    assert set(kinds) == {torch.bfloat16} and method.texts.weight.dtype == torch.float32
    assert history[-1]["pair_loss"] == pytest.approx(train(Pairs())[-1]["pair_loss"], rel=0.05)


# --- several processes ------------------------------------------------------------------------------------------------


def latteclip(micro: bool = False) -> LatteClip:
    """LatteCLIP that trains a map for images and one for texts, with groups and missing texts."""
    draws = torch.Generator().manual_seed(0)
    classes = unit(torch.randn(4, DIM, generator=draws))
    truth = torch.arange(N) % 4
    z = torch.where(torch.arange(N) % 5 == 0, (truth + 1) % 4, truth)
    data = TuneData(
        pseudo_labels=z, class_texts=classes, image_texts=classes[truth] + 0.3 * torch.randn(N, DIM, generator=draws),
        has_image_text=torch.arange(N) % 3 > 0, group_texts=classes + 0.1, group_classes=torch.arange(4),
        image_embeds=classes[truth] + 0.3 * torch.randn(N, DIM, generator=draws),
    )  # fmt: skip
    cfg = LatteClipSettings(text_tower="trainable", alpha=0.1, lr=0.01, epochs=3, batch_size=7, warmup=2)
    return LatteClip(cfg, data)


def _worker(rank: int, world: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        pairs, latte = Pairs(dropout=0, clip_norm=0.5), latteclip()
        for method in (pairs, latte):
            train(method, TrainingSettings(micro_batch=3, ema=0.9) if method is pairs else None)
        torch.save({"pairs": weights(pairs), "latte": weights(latte), "rows": pairs.seen}, f"{out}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    mp.spawn(_worker, args=(2, port, str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert max(one["rows"]) <= 3 and sum(one["rows"]) > sum(two["rows"])  # 11 rows are dealt 6 and 5
    pairs, latte = Pairs(dropout=0, clip_norm=0.5), latteclip()
    train(pairs, TrainingSettings(ema=0.9))
    train(latte)
    for name, alone in (("pairs", pairs), ("latte", latte)):
        same(one[name], two[name])
        same(one[name], weights(alone), atol=1e-6)
    assert not latte.text_map.equal(torch.eye(DIM)) and not latte.prototypes.equal(latteclip().prototypes)
