"""ResNet-18 (He et al. 2015, arXiv:1512.03385, table 1) with a stem for large or for small images.

Parameter names are the usual ones of ImageNet checkpoints (conv1, bn1, layer1.0.conv1, downsample.0, fc).
"""

from typing import Literal, get_args

from torch import Tensor, nn

from research.models.residual import BasicBlock, conv3x3, residual_stage, residual_structure
from research.models.structure import FloatModel, Structure

Stem = Literal["cifar", "imagenet"]


class ResNet(FloatModel):
    """Four stages of basic blocks with 64, 128, 256 and 512 channels and option B shortcuts.

    Args:
        counts: number of blocks of each stage.
        stem: "imagenet" is a 7x7 convolution of stride 2 and a max-pool, "cifar" a 3x3 convolution of stride 1.
        num_classes: number of logits.
        in_channels: channels of the image.

    Raises:
        ValueError: the stem is unknown.
    """

    def __init__(self, counts: tuple[int, int, int, int], stem: Stem, num_classes: int, in_channels: int) -> None:
        super().__init__()
        if stem not in get_args(Stem):
            raise ValueError(f"model.stem={stem}: use cifar (3x3, stride 1) or imagenet (7x7, stride 2, max-pool)")
        self.conv1 = conv3x3(in_channels, 64) if stem == "cifar" else nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = None if stem == "cifar" else nn.MaxPool2d(3, 2, 1)
        self.layer1 = residual_stage(BasicBlock, counts[0], 64, 64, 1, "B")
        self.layer2 = residual_stage(BasicBlock, counts[1], 64, 128, 2, "B")
        self.layer3 = residual_stage(BasicBlock, counts[2], 128, 256, 2, "B")
        self.layer4 = residual_stage(BasicBlock, counts[3], 256, 512, 2, "B")
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(512, num_classes)
        self.initialise_weights()

    def structure(self) -> Structure:
        """Names of the blocks, of the (conv, bn) pairs and of the first and the last layer."""
        return residual_structure(self, stem=(("conv1", "bn1"),))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of the images `x` (N, C, H, W)."""
        x = self.relu(self.bn1(self.conv1(x)))
        if self.maxpool is not None:
            x = self.maxpool(x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.fc(self.flatten(self.avgpool(x)))
        return x


def resnet18(stem: Stem = "cifar", num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-18: two blocks per stage."""
    return ResNet((2, 2, 2, 2), stem, num_classes, in_channels)
