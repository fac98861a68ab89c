"""The thread that runs the model: who arrives together goes together, and nobody pays for another's mistake."""

import threading
from typing import Any

import pytest
import torch

pytest.importorskip("python_multipart", reason="the extra `serve` is not installed")

from latteflow.flows.peers import OwnNames, Waiting
from latteflow.flows.serve import BATCH, Batcher
from latteflow.storage.errors import DataError


def pixels(value: float) -> torch.Tensor:
    return torch.full((3, 2, 2), float(value))


def test_what_arrives_while_the_model_works_goes_together() -> None:
    begun, go, sizes = threading.Event(), threading.Event(), []

    def answer(batch: torch.Tensor) -> list[dict[str, Any]]:
        sizes.append(len(batch))
        begun.set()
        go.wait(10)
        return [{"value": float(each.mean())} for each in batch]

    batcher = Batcher(answer)
    first = batcher(pixels(-1))
    assert begun.wait(10)
    others = [batcher(pixels(number)) for number in range(BATCH + 3)]
    assert others[5].cancel()  # whose client is gone
    go.set()
    assert first.result(10) == {"value": -1.0}
    assert [each.result(10)["value"] for each in others if not each.cancelled()] == [
        number for number in range(BATCH + 3) if number != 5
    ]
    assert sizes == [1, BATCH - 1, 3]
    waiting = batcher(pixels(7))
    batcher.close()
    assert waiting.result(0) == {"value": 7.0}


def test_a_mistake_goes_to_those_who_asked() -> None:
    def answer(batch: torch.Tensor) -> list[dict[str, Any]]:
        if batch.isnan().any():
            raise ValueError("not finite")
        return [{}] * len(batch)

    batcher = Batcher(answer)
    with pytest.raises(ValueError, match="not finite"):
        batcher(pixels(float("nan"))).result(10)
    assert batcher(pixels(0)).result(10) == {}
    batcher.close()


def test_of_too_much_the_peer_that_has_most_loses_its_oldest() -> None:
    gone: list[str] = []
    waiting = Waiting(10)
    first, *_ = [
        waiting.add(peer, weight, lambda name=f"{peer}{number}": gone.append(name))
        for number, (peer, weight) in enumerate([("a", 3), ("b", 2), ("b", 1), ("b", 3)])
    ]
    assert gone == []
    waiting.grow(first, 2)
    assert gone == ["b1"]
    waiting.add("c", 20, lambda: gone.append("c"))  # more than is there for all
    assert gone == ["b1", "c"]
    waiting.remove(first)
    waiting.remove(first)
    alone = waiting.add("d", 6, lambda: gone.append("d"))
    assert gone == ["b1", "c"]
    waiting.grow(alone, 6)
    assert gone == ["b1", "c", "d"]


@pytest.mark.parametrize("name", ["", "http://photos.example.org/", "[::1"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(DataError, match=r"--allow-host '.*' is no name; give one such as"):
        OwnNames(lambda *_: None, [name])  # type: ignore[arg-type]
