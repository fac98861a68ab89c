"""Products by oneDNN are those by MKL, forward and backward, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from latteflow.models import products

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch has no oneDNN to multiply with"
)


@pytest.fixture(autouse=True)
def on_a_slow_processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever this machine has: the way there is the same on all."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    monkeypatch.setattr(products, "_is_slow", lambda: True)
    yield
    torch.backends.mha.set_fastpath_enabled(fast)


def test_a_block_gives_the_same_features_and_gradients() -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, activation="gelu")
    x = torch.randn(8, 25, 64)

    def gradients() -> list[Tensor]:
        block.zero_grad()
        found = block(x)
        found.square().sum().backward()
        return [found.detach(), *(p.grad for p in block.parameters() if p.grad is not None)]

    plain = gradients()
    with products.fast_products():
        fast = gradients()
    assert len(fast) == len(plain) == 1 + len(list(block.parameters()))
    for one, other in zip(fast, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    block.eval()
    with torch.inference_mode():
        plain_features = block(x)
        with products.fast_products():
            torch.testing.assert_close(block(x), plain_features, rtol=1e-4, atol=1e-5)


def test_large_products_go_there_and_small_ones_and_other_numbers_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[tuple[int, ...]] = []
    for name, way in list(products._WAYS.items()):

        def seen(*args: Tensor, way: products.Callable[..., Tensor | None] = way) -> Tensor | None:
            found = way(*args)
            if found is not None:
                gone.append(tuple(found.shape))
            return found

        monkeypatch.setitem(products._WAYS, name, seen)
    large, small = torch.randn(256, 128), torch.randn(4, 128)
    bias = torch.randn(256)
    with products.fast_products():
        found = large @ large.T
        assert gone == [(256, 256)]
        torch.testing.assert_close(torch.addmm(bias, large, large.T), bias + found)
        assert gone == [(256, 256)] * 2
        _ = small @ large.T
        _ = large.double() @ large.double().T
        _ = torch.addmm(found, large, large.T, beta=0.5)  # not what a layer does
    assert gone == [(256, 256)] * 2
    _ = large @ large.T  # outside
    assert gone == [(256, 256)] * 2
