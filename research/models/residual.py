"""The two-convolution residual block in its original and its pre-activation form."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from research.models.blocks import Add, PadShortcut
from research.models.structure import Structure

Shortcut = Literal["A", "B"]


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution, padding 1, without a bias."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution without a bias."""
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """conv-bn-relu-conv-bn, add the shortcut, relu (He et al. 2015, arXiv:1512.03385, figure 2).

    (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)). The shortcut is the identity where
    the shape stays; else option A (`PadShortcut`) or option B (1x1 convolution and batch-norm).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = (
                PadShortcut(stride, in_channels, out_channels)
                if shortcut == "A"
                else nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))
            )
        self.add = Add()
        self.relu2 = nn.ReLU()

    def conv_bn(self) -> list[tuple[str, str]]:
        """(conv, bn) names within the block."""
        pairs = [("conv1", "bn1"), ("conv2", "bn2")]
        return [*pairs, ("downsample.0", "downsample.1")] if isinstance(self.downsample, nn.Sequential) else pairs

    def activation_layer(self) -> list[tuple[str, str]]:
        """(activation, only layer that reads it) names within the block."""
        return [("relu1", "conv2")]

    def forward(self, x: Tensor) -> Tensor:
        """The block's output for `x`."""
        residual = self.relu1(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        shortcut = x if self.downsample is None else self.downsample(x)
        output: Tensor = self.relu2(self.add(residual, shortcut))
        return output


class PerConvShortcutBlock(BasicBlock):
    """`BasicBlock` with a shortcut around each of its convolutions, for binary networks.

    Liu et al. 2018, arXiv:1808.00278 (Bi-Real Net): what a binary convolution loses, the next layer still sees.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__(in_channels, out_channels, stride, shortcut)
        self.add1 = Add()

    def activation_layer(self) -> list[tuple[str, str]]:
        """None: shortcuts read all activations."""
        return []

    def forward(self, x: Tensor) -> Tensor:
        """The block's output for `x`."""
        shortcut = x if self.downsample is None else self.downsample(x)
        middle = self.relu1(self.add1(self.bn1(self.conv1(x)), shortcut))
        output: Tensor = self.relu2(self.add(self.bn2(self.conv2(middle)), middle))
        return output


class PreactivationBlock(nn.Module):
    """bn-relu-conv-bn-relu-conv, add the shortcut (He et al. 2016, arXiv:1603.05027, figure 1b).

    Shapes as in `BasicBlock`. Where the shape changes, the shortcut (option A, or a 1x1 convolution without a norm)
    reads the activated input; elsewhere it is the identity on the raw input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = conv3x3(out_channels, out_channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = (
                PadShortcut(stride, in_channels, out_channels)
                if shortcut == "A"
                else nn.Sequential(conv1x1(in_channels, out_channels, stride))
            )
        self.add = Add()

    def conv_bn(self) -> list[tuple[str, str]]:
        """(conv, bn) names within the block: only the first convolution feeds a norm alone."""
        return [("conv1", "bn2")]

    def activation_layer(self) -> list[tuple[str, str]]:
        """(activation, only layer that reads it) names within the block; a changing shortcut reads one too."""
        first = [("relu1", "conv1")] if self.downsample is None else []
        return [*first, ("relu2", "conv2")]

    def forward(self, x: Tensor) -> Tensor:
        """The block's output for `x`."""
        activated = self.relu1(self.bn1(x))
        residual = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        shortcut = x if self.downsample is None else self.downsample(activated)
        output: Tensor = self.add(residual, shortcut)
        return output


def residual_stage(
    block: type[BasicBlock] | type[PreactivationBlock],
    count: int,
    in_channels: int,
    out_channels: int,
    stride: int,
    shortcut: Shortcut,
) -> nn.Sequential:
    """`count` blocks of `out_channels`; the first one takes the stride and the change of channels."""
    first = block(in_channels, out_channels, stride, shortcut)
    return nn.Sequential(first, *(block(out_channels, out_channels, 1, shortcut) for _ in range(count - 1)))


ResidualBlock = BasicBlock | PreactivationBlock


def residual_structure(model: nn.Module, stem: tuple[tuple[str, str], ...]) -> Structure:
    """Structure of a net of residual blocks between `conv1` and `fc`.

    Args:
        model: the network.
        stem: its (conv, bn) pairs in front of the blocks.
    """
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, ResidualBlock)}

    def within(pairs: Callable[[ResidualBlock], list[tuple[str, str]]]) -> tuple[tuple[str, str], ...]:
        return tuple((f"{name}.{a}", f"{name}.{b}") for name, block in blocks.items() for a, b in pairs(block))

    return Structure(
        blocks=tuple(blocks),
        conv_bn=(*stem, *within(lambda block: block.conv_bn())),
        first="conv1",
        last="fc",
        activation_layer=within(lambda block: block.activation_layer()),
    )
