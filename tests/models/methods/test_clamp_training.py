"""CLAMP in training: what is drawn, and that memory, micro-batches, processes and kept states change no number."""

from __future__ import annotations

import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import tinylm
from latteflow.models.methods.clamp import ClampSettings
from latteflow.models.methods.clamp.tower import ClampTower
from latteflow.models.methods.clamp.training import Clamp, ClampData
from latteflow.models.methods.training import train
from latteflow.models.settings import TrainingSettings
from latteflow.models.vectors import unit

N, DIM = 21, 16


def data(**changes: Any) -> ClampData:
    generator = torch.Generator().manual_seed(0)
    texts = [f"shape {'x' * (i % 5)} number {i}" for i in range(N)]
    texts += ["red shapes", "blue ones", "a red shape", "a red thing", "a blue shape", "a blue thing"]
    image_texts = torch.arange(N)
    image_texts[3] = -1
    fields: dict[str, Any] = {
        "image_features": unit(torch.randn(N, DIM, generator=generator)),
        "texts": texts,
        "teacher": unit(torch.randn(len(texts), DIM, generator=generator)),
        "teacher_scale": 20.0,
        "image_texts": image_texts,
        "group_texts": [[] if i % 7 == 6 else [N + i % 2] for i in range(N)],
        "class_texts": [[N + 2, N + 3], [N + 4, N + 5]],
        "pseudo_labels": torch.arange(N) % 2,
    }
    return ClampData(**fields | changes)


def method(**settings: Any) -> Clamp:
    cfg = {"prompts": 3, "pool_heads": 4, "wrapper": "single", "batch_size": 7, "steps": 6, "lr": 1e-2, "lora_lr": 1e-2}
    tower = ClampTower(tinylm.language_model(), tinylm.tokenizer(), ClampSettings(**cfg | settings), DIM)
    return Clamp(tower, data())


def trained(training: TrainingSettings | None = None, **settings: Any) -> tuple[dict[str, Tensor], list[Any]]:
    clamp = method(**settings)
    history = train(clamp, training)
    return clamp.tower.adapter(), history


def same(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for name in a.keys() - {"pool.k.bias"}:  # shifts all logits alike: its gradient is 0, and Adam moves it by rounding
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0, msg=name)


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_each_image_once_for_each_epoch_with_texts_in_their_shares():
    clamp = method(steps=3000, class_share=0.2, group_share=0.3)
    found = list(clamp.batches())
    assert len(found) == 3000 and clamp.steps_per_epoch == 3
    epoch = torch.cat([b.about.images for b in found[:3]])
    assert sorted(epoch.tolist()) == list(range(N))
    pairs = [(i, t) for b in found for i, t in zip(b.about.images.tolist(), b.about.texts.tolist(), strict=True)]
    ordinary = [(i, t) for i, t in pairs if i % 7 != 6 and i != 3]
    share = [sum(test(i, t) for i, t in ordinary) / len(ordinary) for test in (
        lambda i, t: t == i, lambda i, t: t == N + i % 2, lambda i, t: t in ([N + 2, N + 3], [N + 4, N + 5])[i % 2],
    )]  # fmt: skip
    assert share == pytest.approx([0.8 * 0.7, 0.8 * 0.3, 0.2], abs=0.01) and sum(share) == pytest.approx(1)
    assert {t for i, t in pairs if i == 3} == {N + 1, N + 4, N + 5}  # no description of its own
    assert {t for i, t in pairs if i == 6} == {6, N + 2, N + 3}  # no group


def test_a_batch_encodes_each_text_once_shortest_first():
    clamp = method(class_share=1.0)
    for batch in clamp.batches():
        rows, about = batch.inputs["texts"], batch.about
        assert len(set(rows.tolist())) == len(rows) <= 4 and rows[about.rows].equal(about.texts)
        assert clamp.lengths[rows].diff().ge(0).all()


def test_no_batch_is_of_one_pair():
    for n in range(2, 12):
        fields = data().__dict__ | {"image_features": unit(torch.randn(n, DIM))}
        tower = ClampTower(tinylm.language_model(), tinylm.tokenizer(), ClampSettings(prompts=1, batch_size=2), DIM)
        sizes = [len(b.about.images) for b in Clamp(tower, ClampData(**fields)).batches()]
        assert min(sizes) >= 2 and max(sizes) <= 3
    with pytest.raises(ValueError, match="got 1 image"):
        data(image_features=torch.ones(1, DIM))
    with pytest.raises(ValueError, match="occurs twice"):
        data(texts=["a", "a"])


# --- learning, and what must not change it ----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 4}, {"reduction": "sum"}, {"distill_scale": "native"}])
def test_both_losses_fall(settings):
    history = trained(steps=30, **settings)[1]
    for name in ("contrastive_loss", "distill_loss"):
        assert history[-1][name] < history[0][name]
    assert set(trained(steps=3, distill=0)[1][0]) == {"contrastive_loss", "loss", "scale", "epoch", "step", "lr"}


def test_the_pool_may_learn_first_from_states_that_are_computed_once():
    clamp = method(pool_steps=30, steps=1, lr=1e-3)
    start, asks = clamp.tower.prompts.detach().clone(), 0
    ask = clamp.tower.ask

    def counted(valid: Tensor, states: Any) -> Tensor:
        nonlocal asks
        asks += len(valid)
        return ask(valid, states)

    clamp.tower.ask = counted  # type: ignore[method-assign]
    seen: list[tuple[Tensor, int]] = []
    history = train(clamp, on_step=lambda *_: seen.append((clamp.tower.prompts.detach().clone(), asks)))
    assert all(prompts.equal(start) for prompts, _ in seen[:30]) and not seen[30][0].equal(start)
    assert seen[29][1] <= len(clamp.data.texts) < seen[30][1]
    assert history[9]["loss"] < history[0]["loss"] and not clamp.asked
    assert [clamp.learning_rate(step) > clamp.learning_rate(step - 1) for step in (1, 29, 30)] == [False, False, True]


def test_kept_states_change_no_number():
    everything, nothing, some = (trained(cache_gb=size)[0] for size in (1, 0, 1e-4))
    same(everything, nothing)
    same(everything, some)


def test_the_budget_holds():
    clamp = method(cache_gb=1e-4)
    train(clamp)
    kept = sum(row.nbytes for row in clamp.kept._rows.values())
    assert 0 < kept <= 1e5 and len(clamp.kept._rows) < len(clamp.data.texts)


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 4, "lora_dropout": 0.0}])
def test_micro_batches_are_the_whole_batch(settings):
    same(trained(**settings)[0], trained(TrainingSettings(micro_batch=2), **settings)[0])


def test_dropout_of_lora_is_replayed():
    """Chunks draw other dropout than the whole batch, but the second pass must draw that of the first."""
    clamp = method(lora_rank=4, lora_dropout=0.5, steps=1)
    for name, p in clamp.named_parameters():
        if "lora_B" in name:
            p.data += 0.1
    seen: list[Tensor] = []
    plain = clamp.encode
    clamp.encode = lambda kind, loaded: seen.append(plain(kind, loaded)) or seen[-1]  # type: ignore[method-assign]
    train(clamp, TrainingSettings(micro_batch=3))
    parts = (len(seen) + 1) // 2  # all of the parts once, and those before the last again
    assert parts >= 2
    for first, second in zip(seen[: parts - 1], seen[parts:], strict=True):
        assert first.equal(second.detach())


def test_a_run_goes_on_where_it_was_cut():
    class Memory:
        data: bytes | None = None

        def read(self) -> bytes | None:
            return self.data

        def write(self, data: bytes) -> None:
            self.data = data

    class Cut(Exception):
        pass

    def cut(done: int, *_: Any) -> None:
        if done == 5:
            raise Cut

    whole, memory = method(lora_rank=2), Memory()
    train(whole)
    with pytest.raises(Cut):
        train(method(lora_rank=2), TrainingSettings(checkpoint_s=0), checkpoint=memory, on_step=cut)
    gone_on = method(lora_rank=2)
    train(gone_on, checkpoint=memory)
    for name, tensor in whole.tower.adapter().items():
        assert tensor.equal(gone_on.tower.adapter()[name]), name
    assert b"embed_tokens" not in memory.data  # the language model is not in it


def test_the_scale_stays_below_one_hundred():
    clamp = method(steps=2)
    clamp.tower.log_scale.data.fill_(math.log(100))
    assert train(clamp)[0]["scale"] <= 100.001


def _worker(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    clamp = method(lora_rank=2, lora_dropout=0.0, class_share=0.9)
    train(clamp)
    torch.save(dict(clamp.tower.adapter()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_worker, args=(2, port, str(tmp_path)), nprocs=2)
    one = trained(lora_rank=2, lora_dropout=0.0, class_share=0.9)[0]
    for rank in (0, 1):
        same(one, torch.load(tmp_path / f"{rank}.pt", weights_only=True))


@pytest.mark.parametrize("lora", [0, 4])
def test_half_precision_learns_about_the_same(lora: int) -> None:
    full = trained(steps=10, lora_rank=lora, lora_dropout=0.0)[1][-1]["loss"]
    autocast = trained(TrainingSettings(precision="bfloat16"), steps=10, lora_rank=lora, lora_dropout=0.0)[1][-1][
        "loss"
    ]
    tower = ClampTower(
        tinylm.language_model().bfloat16(),
        tinylm.tokenizer(),
        method(steps=10, lora_rank=lora, lora_dropout=0.0).cfg,
        DIM,
    )
    stored = train(Clamp(tower, data()))[-1]["loss"]
    assert [autocast, stored] == pytest.approx([full, full], rel=0.05)
