"""EfficientNet-Lite0, the image tower of the embedded model, with the tensors of timm's `tf_efficientnet_lite0`.

Written out here so that answers by the embedded model start without timm, which takes longer to import than a few
pictures take to read: half of the time of `predict`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DIM = 1280
STAGES = (
    # blocks, kernel, stride of the first, expansion, channels (Tan and Le 2019, table 1; the first and last stage of a
    # Lite model are not scaled)
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM = 32

# About memory traffic: a chunk's largest activation stays in reach of the caches and below 32 MB, the size from which
# the C allocator returns every buffer to the system and pays page faults for the next one.
IMAGES_PER_CHUNK = 6


class EfficientNetLite0(nn.Module):
    """Pictures ``(n, 3, 224, 224)`` -> pooled features ``(n, 1280)``, as trained with TensorFlow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem, self.bn1 = _conv(3, STEM, 3, stride=2), _norm(STEM)
        stages, narrow = [], STEM
        for n_blocks, kernel, stride, expansion, channels in STAGES:
            blocks = []
            for place in range(n_blocks):
                blocks.append(_Block(narrow, channels, kernel, stride if place == 0 else 1, expansion))
                narrow = channels
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv_head, self.bn2 = _conv(narrow, DIM, 1), _norm(DIM)

    def forward(self, pixels: Tensor) -> Tensor:
        """With a graph, where one is wanted."""
        x = F.relu6(self.bn1(_same(self.conv_stem, pixels)))
        return F.relu6(self.bn2(self.conv_head(self.blocks(x)))).mean((2, 3))

    def layers(self) -> list[tuple[list[Layer], bool]]:
        """Runs of layers, each with whether its input is added to its output."""
        blocks = [(block.layers(), block.has_skip) for block in self.blocks.modules() if isinstance(block, _Block)]
        return [([(self.conv_stem, self.bn1, True)], False), *blocks, ([(self.conv_head, self.bn2, True)], False)]


Layer = tuple[nn.Conv2d, nn.BatchNorm2d, bool]
"""A convolution, its norm, and whether ReLU6 follows."""


class _Block(nn.Module):
    """Inverted residual: wider by a pointwise convolution, depthwise, narrower by a pointwise one."""

    def __init__(self, narrow: int, channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = expansion * narrow
        depthwise = _conv(wide, wide, kernel, stride, groups=wide)
        if expansion == 1:
            self.conv_dw, self.bn1 = depthwise, _norm(wide)
            self.conv_pw, self.bn2 = _conv(wide, channels, 1), _norm(channels)
        else:
            self.conv_pw, self.bn1 = _conv(narrow, wide, 1), _norm(wide)
            self.conv_dw, self.bn2 = depthwise, _norm(wide)
            self.conv_pwl, self.bn3 = _conv(wide, channels, 1), _norm(channels)
        self.has_skip = stride == 1 and narrow == channels

    def layers(self) -> list[Layer]:
        convs = [module for module in self.children() if isinstance(module, nn.Conv2d)]
        norms = [module for module in self.children() if isinstance(module, nn.BatchNorm2d)]
        return [(conv, norm, conv is not convs[-1]) for conv, norm in zip(convs, norms, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv, norm, is_relu6 in self.layers():
            y = norm(_same(conv, y))
            y = F.relu6(y) if is_relu6 else y
        return x + y if self.has_skip else y


class FoldedTower:
    """The tower with batch norms folded into the convolutions, for inference: the same to 1e-4, twice as fast.

    TensorFlow pads a stride-2 convolution on the far side only, which costs a copy of the picture in PyTorch. Turned by
    180 degrees, picture and kernels alike, the padding comes first and is the one PyTorch has built in; the pooled
    feature does not know which way up the picture was.
    """

    class Conv(NamedTuple):
        weight: Tensor
        bias: Tensor
        stride: tuple[int, ...]
        groups: int
        is_relu6: bool

        def __call__(self, x: Tensor) -> Tensor:
            x = F.conv2d(x, self.weight, self.bias, self.stride, self.weight.shape[-1] // 2, groups=self.groups)
            return x.clamp_(0, 6) if self.is_relu6 else x

    def __init__(self, tower: EfficientNetLite0) -> None:
        self.blocks = [([self._fold(*layer) for layer in layers], has_skip) for layers, has_skip in tower.layers()]

    def __call__(self, pixels: Tensor) -> Tensor:
        """``(n, 3, 224, 224)`` -> pooled ``(n, 1280)``."""
        n_rows = IMAGES_PER_CHUNK if pixels.device.type == "cpu" else 64 * IMAGES_PER_CHUNK
        with torch.no_grad():
            return torch.cat([self._pool(chunk) for chunk in pixels.split(n_rows)])

    def _pool(self, pixels: Tensor) -> Tensor:
        x = pixels.flip(2, 3).contiguous(memory_format=torch.channels_last)
        for convs, has_skip in self.blocks:
            y = x
            for conv in convs:
                y = conv(y)
            x = y.add_(x) if has_skip else y
        return x.mean((2, 3))

    def _fold(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, is_relu6: bool) -> Conv:
        assert norm.running_var is not None and norm.running_mean is not None
        gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        weight = (conv.weight * gain[:, None, None, None]).flip(2, 3).contiguous(memory_format=torch.channels_last)
        bias = norm.bias - norm.running_mean * gain
        return self.Conv(weight, bias, conv.stride, conv.groups, is_relu6)


def _conv(n_in: int, n_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def _same(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """TensorFlow's padding of even sides: what is odd of it goes to the far side."""
    total = conv.kernel_size[0] - conv.stride[0]
    if total == 0:
        return conv(x)
    near = total // 2
    return conv(F.pad(x, (near, total - near, near, total - near)))
