"""MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) with the strides usual for 32x32 images."""

from torch import Tensor, nn

from research.models.blocks import Add
from research.models.conv_block import ConvBlock, conv_block_pairs
from research.models.structure import FloatModel, Structure

# expansion, channels, number of blocks, stride of the first block: table 2 of the paper with stride 1 at 24 channels
STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def scaled_channels(channels: int, width_mult: float) -> int:
    """Multiple of 8 nearest to `channels * width_mult`, at least 8 and never more than 10 % below the product."""
    product = channels * width_mult
    nearest = max(8, int(product + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * product else nearest + 8


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution, linear 1x1 projection (paper, figure 4d).

    (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)). With equal shapes at both ends the
    input is added. Expansion 1 has no expanding convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.expand = ConvBlock(in_channels, hidden, 1, activation=nn.ReLU6) if expansion != 1 else None
        self.depthwise = ConvBlock(hidden, hidden, 3, stride, groups=hidden, activation=nn.ReLU6)
        self.project = ConvBlock(hidden, out_channels, 1, activation=None)
        self.add = Add() if stride == 1 and in_channels == out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """The block's output for `x`."""
        expanded = x if self.expand is None else self.expand(x)
        projected: Tensor = self.project(self.depthwise(expanded))
        if self.add is not None:
            projected = self.add(projected, x)
        return projected


class MobileNetV2(FloatModel):
    """Stem, seventeen inverted residual blocks, 1x1 head, global average, dropout, linear layer.

    Args:
        num_classes: number of logits.
        in_channels: channels of the image.
        width_mult: factor on the channels of every layer; the head stays at 1280 channels for factors below 1.
        dropout: probability of dropping a feature before the linear layer.

    Raises:
        ValueError: the width factor is not positive.
    """

    def __init__(self, num_classes: int, in_channels: int, width_mult: float, dropout: float) -> None:
        super().__init__()
        if width_mult <= 0:
            raise ValueError(f"model.width_mult={width_mult}: the factor on the channels is positive; use 0.5 or 1.0")
        channels = scaled_channels(32, width_mult)
        self.stem = ConvBlock(in_channels, channels, 3, activation=nn.ReLU6)
        blocks: list[nn.Module] = []
        for expansion, stage_channels, count, stride in STAGES:
            out_channels = scaled_channels(stage_channels, width_mult)
            for index in range(count):
                blocks.append(InvertedResidual(channels, out_channels, stride if index == 0 else 1, expansion))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        head_channels = scaled_channels(1280, max(1.0, width_mult))
        self.head = ConvBlock(channels, head_channels, 1, activation=nn.ReLU6)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(head_channels, num_classes)
        self.initialise_weights()

    def structure(self) -> Structure:
        """Names of the inverted residual blocks, of the (conv, bn) pairs and of the first and the last layer."""
        blocks = tuple(name for name, module in self.named_modules() if isinstance(module, InvertedResidual))
        return Structure(blocks=blocks, conv_bn=conv_block_pairs(self), first="stem.conv", last="fc")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of the images `x` (N, C, H, W)."""
        x = self.head(self.blocks(self.stem(x)))
        x = self.fc(self.dropout(self.flatten(self.avgpool(x))))
        return x


def mobilenet_v2(
    num_classes: int = 10, in_channels: int = 3, width_mult: float = 1.0, dropout: float = 0.2
) -> MobileNetV2:
    """MobileNetV2 for 32x32 images: stride 1 in the stem and in the stage of 24 channels, 4x4 pixels at the end."""
    return MobileNetV2(num_classes, in_channels, width_mult, dropout)
