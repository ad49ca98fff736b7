"""VGG networks for small images: 3x3 convolutions with batch-norm, max-pools and one linear layer."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from research.models.conv_block import ConvBlock, conv_block_pairs
from research.models.structure import FloatModel, Structure

POOL = "M"
VGG_SMALL = (128, 128, POOL, 256, 256, POOL, 512, 512, POOL)
VGG16 = (64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512, POOL, 512, 512, 512, POOL)


class Vgg(FloatModel):
    """Conv-bn-relu groups and 2x2 max-pools in the order of `plan`, then one linear layer on all remaining pixels.

    Pools round odd sizes up, so that 28x28 images end at the sizes of 32x32 ones.

    Args:
        plan: output channels of each convolution; "M" is a max-pool.
        num_classes: number of logits.
        in_channels: channels of the image.
        image_size: height and width of the image; the linear layer's size depends on it.
    """

    def __init__(self, plan: Sequence[int | str], num_classes: int, in_channels: int, image_size: int) -> None:
        super().__init__()
        channels, size = in_channels, image_size
        features: list[nn.Module] = []
        for entry in plan:
            if isinstance(entry, int):
                features.append(ConvBlock(channels, entry, 3))
                channels = entry
            else:
                features.append(nn.MaxPool2d(2, ceil_mode=True))
                size = (size + 1) // 2
        self.features = nn.Sequential(*features)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(channels * size * size, num_classes)
        self.initialise_weights()

    def structure(self) -> Structure:
        """Names of the conv-bn-relu groups, of the pairs in and between them and of the first and the last layer."""
        pairs = conv_block_pairs(self)
        blocks = tuple(conv.removesuffix(".conv") for conv, _ in pairs)
        neighbours = tuple(
            (f"features.{index}.relu", f"features.{index + 1}.conv")
            for index, (here, behind) in enumerate(pairwise(self.features))
            if isinstance(here, ConvBlock) and isinstance(behind, ConvBlock)
        )
        return Structure(blocks, pairs, first=pairs[0][0], last="fc", activation_layer=neighbours)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of the images `x` (N, C, H, W)."""
        x = self.fc(self.flatten(self.features(x)))
        return x


def vgg_small(num_classes: int = 10, in_channels: int = 3, image_size: int = 32) -> Vgg:
    """VGG-small of the low-bit literature (as in LQ-Nets, arXiv:1807.10029): six convolutions, one linear layer.

    Order conv-bn-relu-pool, which folds for any sign of the norm's weight; LQ-Nets' code pools before the norm.
    """
    return Vgg(VGG_SMALL, num_classes, in_channels, image_size)


def vgg16_bn(num_classes: int = 10, in_channels: int = 3, image_size: int = 32) -> Vgg:
    """VGG-16 with batch-norm (arXiv:1409.1556, column D) with the one linear layer usual for CIFAR, 512 -> classes."""
    return Vgg(VGG16, num_classes, in_channels, image_size)
