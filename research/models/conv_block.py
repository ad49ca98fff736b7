"""The convolution, batch-norm, activation group of plain and mobile networks."""

from collections import OrderedDict

from torch import nn


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


def conv_block_pairs(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """(conv, bn) names of all `ConvBlock`s of `model`, in forward order."""
    return tuple(
        (f"{name}.conv", f"{name}.bn") for name, module in model.named_modules() if isinstance(module, ConvBlock)
    )
