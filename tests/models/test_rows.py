"""Rows on disk: the same numbers as a tensor, whatever is asked of them, and methods that cannot tell."""

from __future__ import annotations

import errno
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latteflow.models import rows as rows_of
from latteflow.models.errors import ModelError
from latteflow.models.methods.adaptation import Adapted, TuneData
from latteflow.models.methods.registry import METHODS, adapt
from latteflow.models.rows import Rows, Stored, blocks, in_memory, take, through, together
from latteflow.models.vectors import unit


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(tensor: torch.Tensor) -> Stored:
    found = Stored(*tensor.shape)
    found[:] = tensor
    return found


@given(n=st.integers(1, 40), width=st.integers(1, 5), data=st.data())
def test_as_a_tensor(n: int, width: int, data: st.DataObject) -> None:
    table = noise(n, width)
    rows = stored(table)
    first, last = data.draw(st.integers(0, n)), data.draw(st.integers(0, n))
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, n - 1))), dtype=torch.int64)
    some = torch.tensor(data.draw(st.lists(st.integers(-1, n - 1))), dtype=torch.int64)
    both = together([rows, table, rows])
    assert rows[first:last].equal(table[first:last]) and rows[chosen].equal(table[chosen])
    assert in_memory(take(rows, some)).equal(take(table, some)) and take(table, some)[some < 0].eq(0).all()
    assert both[chosen + n].equal(table[chosen]) and in_memory(both).equal(table.repeat(3, 1))
    assert in_memory(through(rows, unit)).equal(unit(table)) and in_memory(rows.through(unit).kept()).equal(unit(table))


def test_blocks_are_all_of_it_and_are_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    table = noise(23, 4)
    monkeypatch.setattr(rows_of, "BLOCK_NUMBERS", 4 * 5)
    for matrix in (table, stored(table)):
        found = list(blocks(matrix))
        assert [(at.start, at.stop) for at, _ in found] == [(0, 5), (5, 10), (10, 15), (15, 20), (20, 23)]
        assert torch.cat([block for _, block in found]).equal(table)


def test_a_full_disk_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Stored(4, 2)

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ModelError, match=r"do not fit into the temporary folder .*No space left.* set TMPDIR"):
        rows[:2] = torch.ones(2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transduction", "latteclip", "latteclip_plus", "flyp", "self_training"])
def test_a_method_gives_the_same_from_disk(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of a few images, so that all of them count."""
    n, classes = 90, unit(noise(4, 8))
    truth = torch.arange(n) % 4
    texts = unit(classes + 0.4 * noise(4, 8, seed=1))
    data = TuneData(
        pseudo_labels=truth,
        class_texts=texts,
        image_embeds=3 * unit(classes[truth] + 0.2 * noise(n, 8, seed=2)),
        centre=0.1 * noise(8, seed=3),
        image_texts=unit(classes[truth] + 0.2 * noise(n, 8, seed=4)),
        has_image_text=torch.arange(n) % 7 > 0,
        group_texts=unit(classes[truth] + 0.1 * noise(n, 8, seed=5)),
        group_classes=truth,
    )
    assert data.image_embeds is not None and data.image_texts is not None and data.group_texts is not None

    def made(data: TuneData) -> Adapted:
        return adapt(name, data, seed=1, scale=20.0)

    expected = made(data)
    monkeypatch.setattr(rows_of, "BLOCK_NUMBERS", 8 * 16)
    on_disk = replace(
        data,
        image_embeds=stored(in_memory(data.image_embeds)),
        image_texts=stored(in_memory(data.image_texts)),
        group_texts=stored(in_memory(data.group_texts)),
    )
    found = made(on_disk)
    assert METHODS[name].streams
    torch.testing.assert_close(found.prototypes, expected.prototypes, rtol=0, atol=1e-4)
    if expected.assignments is not None:
        assert isinstance(found.assignments, Rows)
        torch.testing.assert_close(in_memory(found.assignments), in_memory(expected.assignments), rtol=0, atol=1e-3)
    if name == "latteclip":
        assert found.prototypes.equal(expected.prototypes)
    assert made(on_disk.in_memory()).prototypes.dtype == torch.float32
