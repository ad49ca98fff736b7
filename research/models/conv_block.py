"""The convolution, batch-norm, activation group of plain and mobile networks."""

from collections import OrderedDict

import torch
from torch import Tensor, nn


class ConvBlock(nn.Sequential):
    """Children `conv` (square kernel, same padding, no bias), `bn` and, unless None, `relu` or `relu6`.

    (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        activation: type[nn.ReLU] | type[nn.ReLU6] | None = nn.ReLU,
    ) -> None:
        children: OrderedDict[str, nn.Module] = OrderedDict(
            conv=nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False),
            bn=nn.BatchNorm2d(out_channels),
        )
        if activation is not None:
            children[activation.__name__.lower()] = activation()
        super().__init__(children)

    def forward(self, input: Tensor) -> Tensor:
        """The block's output for `input`."""
        output = input
        for module in self:
            output = convolve(module, output) if isinstance(module, nn.Conv2d) else module(output)
        return output


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv` of x, (N, C, H, W) -> (N, C', H', W').

    A strided depthwise one keeps float32 under autocast on the CPU, whose bf16 backward pass of it is ten times slower
    (96 channels of 16x16 pixels, batch 128: 79 ms, 6 ms in float32).
    """
    strided_depthwise = conv.groups == conv.out_channels and max(conv.stride) > 1
    if not (strided_depthwise and x.device.type == "cpu" and torch.is_autocast_enabled("cpu")):
        y: Tensor = conv(x)
        return y
    with torch.autocast("cpu", enabled=False):
        y = conv(x.float())
    return y


def conv_block_pairs(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """(conv, bn) names of all `ConvBlock`s of `model`, in forward order."""
    return tuple(
        (f"{name}.conv", f"{name}.bn") for name, module in model.named_modules() if isinstance(module, ConvBlock)
    )
