"""What is cheap to make again is not kept for the way back.

A layer that multiplies by a matrix keeps its input, and in a transformer that input is mostly what a norm or an
activation made of something that is kept as well. Of these only what they were made of stays, and they are made again
when the way back needs them: the same bits, in less memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Recipe:
    """How a tensor was made. Versions tell whether somebody wrote into it, or into what it was made of."""

    module: nn.Module
    made_of: Tensor
    version: int
    out: weakref.ref[Tensor]
    out_version: int


@dataclass(frozen=True)
class _Packed:
    recipe: _Recipe
    shape: torch.Size


class Remade:
    """The cheap layers of a model: norms and activations, which draw nothing at random.

    Args:
        model: as it is run inside :meth:`__call__`.
        arithmetic: the context that it is run in, for when a layer is run again.
    """

    def __init__(self, model: nn.Module, arithmetic: Callable[[], AbstractContextManager[Any]]) -> None:
        self._arithmetic = arithmetic
        kinds = (nn.LayerNorm, nn.GELU)
        self._modules = [m for m in model.modules() if isinstance(m, kinds) or type(m).__name__ == "QuickGELU"]
        self._made: dict[int, _Recipe] = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """What is run inside keeps none of their outputs for its way back."""
        if not torch.is_grad_enabled():
            yield
            return
        hooks = [module.register_forward_hook(self._note) for module in self._modules]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._made.clear()
            for hook in hooks:
                hook.remove()

    def _note(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        if len(args) == 1 and out.is_contiguous():
            made_of = args[0].detach()
            self._made[out.data_ptr()] = _Recipe(module, made_of, made_of._version, weakref.ref(out), out._version)

    def _pack(self, tensor: Tensor) -> Tensor | _Packed:
        """What is kept of a tensor: itself, or how it was made and the shape that it is seen in."""
        recipe = self._made.get(tensor.data_ptr())
        # A place in memory says nothing once what was there is gone, or was written over.
        if recipe is None or (out := recipe.out()) is None or out._version != recipe.out_version:
            return tensor
        if out.numel() != tensor.numel() or out.dtype != tensor.dtype or not tensor.is_contiguous():
            return tensor
        return _Packed(recipe, tensor.shape)

    def _unpack(self, packed: Tensor | _Packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        recipe = packed.recipe
        if recipe.made_of._version != recipe.version:
            raise RuntimeError(f"what a {type(recipe.module).__name__} was given was written over before the way back")
        with torch.no_grad(), self._arithmetic():
            again: Tensor = recipe.module.forward(recipe.made_of)
        return again.view(packed.shape)
