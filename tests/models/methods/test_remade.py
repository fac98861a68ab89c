"""Norms and activations that are made again: the same gradients, less memory, and nothing left behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from latteflow.models.methods.remade import Remade


def block() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))


def gradients(model: nn.Module, around: Callable[[], contextlib.AbstractContextManager[None]]) -> list[Tensor]:
    model.zero_grad()
    x = torch.linspace(-1, 1, 8 * 5 * 16).view(8, 5, 16).requires_grad_()
    with around():
        found = model(x) + x
    found.square().sum().backward()
    assert x.grad is not None
    return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("half", [False, True])
def test_gradients_are_the_same_bits(half: bool) -> None:
    model = block()

    def arithmetic() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=half)

    remade = Remade(model, arithmetic)

    @contextlib.contextmanager
    def both():  # type: ignore[no-untyped-def]
        with arithmetic(), remade():
            yield

    found, expected = gradients(model, both), gradients(model, arithmetic)
    assert len(found) == len(expected) == 7
    assert all(one.equal(other) for one, other in zip(found, expected, strict=True))


def test_less_is_kept_and_no_hook_stays() -> None:
    model, kept = block(), list[int]()
    remade = Remade(model, contextlib.nullcontext)
    whole = remade._pack

    def counted(tensor: Tensor):  # type: ignore[no-untyped-def]
        packed = whole(tensor)
        kept.append(isinstance(packed, Tensor))
        return packed

    remade._pack = counted  # type: ignore[method-assign]
    gradients(model, remade)
    assert kept.count(False) == 2, "the inputs of both linear layers"
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad(), remade():
        assert not any(module._forward_hooks for module in model.modules())


def test_what_was_written_over_is_kept_as_it_is() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.out = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            found = self.norm(x)
            return self.out(found.mul_(2))

    model = Odd()
    remade = Remade(model, contextlib.nullcontext)
    found, expected = gradients(model, remade), gradients(model, contextlib.nullcontext)
    assert all(one.equal(other) for one, other in zip(found, expected, strict=True))
