"""ResNets for small images (He et al. 2015, arXiv:1512.03385, section 4.2) and their pre-activation form."""

from typing import Literal, TypedDict, Unpack, get_args

from torch import Tensor, nn

from research.models.residual import (
    BasicBlock,
    PerConvShortcutBlock,
    PreactivationBlock,
    Shortcut,
    conv3x3,
    residual_stage,
    residual_structure,
)
from research.models.structure import FloatModel, Structure

Activation = Literal["relu", "hardtanh"]


class ResNetCifar(FloatModel):
    """Three stages of n residual blocks with `width`, 2 `width` and 4 `width` channels; depth = 6n + 2.

    Args:
        depth: number of convolutions and linear layers on the longest path: 8, 14, 20, 26, 32, ...
        shortcut: where the shape changes, "A" pads with zero channels, "B" projects by a 1x1 convolution.
        num_classes: number of logits.
        in_channels: channels of the image: 3 for colour, 1 for grey.
        preactivation: BN-ReLU-conv order (He et al. 2016, arXiv:1603.05027) with a norm and an activation at the end.
        width: channels of the first stage.
        activation: "relu", or "hardtanh", whose signed outputs binary inputs need; module names stay.
        shortcut_per_conv: a shortcut around every convolution instead of every two (Bi-Real Net); same parameters.

    Raises:
        ValueError: the depth is not 6n + 2, an unknown choice, or shortcuts per convolution with pre-activation.
    """

    def __init__(
        self,
        depth: int,
        shortcut: Shortcut = "A",
        num_classes: int = 10,
        in_channels: int = 3,
        preactivation: bool = False,
        width: int = 16,
        activation: Activation = "relu",
        shortcut_per_conv: bool = False,
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"model.depth={depth}: the depth is 6n + 2; use 8, 20, 32 or 56")
        if width < 1:
            raise ValueError(f"model.width={width}: use 1 channel or more")
        if shortcut not in get_args(Shortcut):
            raise ValueError(f"model.shortcut={shortcut}: use A (zero padding) or B (1x1 convolution)")
        if activation not in get_args(Activation):
            raise ValueError(f"model.activation={activation}: use relu or hardtanh")
        if preactivation and shortcut_per_conv:
            raise ValueError("model.shortcut_per_conv=true: has no pre-activation form, use model.preactivation=false")
        count = (depth - 2) // 6
        block: type[BasicBlock] | type[PreactivationBlock] = PreactivationBlock if preactivation else BasicBlock
        if shortcut_per_conv:
            block = PerConvShortcutBlock
        self.preactivation = preactivation
        self.conv1 = conv3x3(in_channels, width)
        if not preactivation:
            self.bn1 = nn.BatchNorm2d(width)
            self.relu = nn.ReLU()
        self.layer1 = residual_stage(block, count, width, width, 1, shortcut)
        self.layer2 = residual_stage(block, count, width, 2 * width, 2, shortcut)
        self.layer3 = residual_stage(block, count, 2 * width, 4 * width, 2, shortcut)
        if preactivation:
            self.bn1 = nn.BatchNorm2d(4 * width)
            self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(4 * width, num_classes)
        if activation == "hardtanh":
            for name in [name for name, module in self.named_modules() if isinstance(module, nn.ReLU)]:
                self.set_submodule(name, nn.Hardtanh())
        self.initialise_weights()

    def structure(self) -> Structure:
        """Names of the blocks, of the (conv, bn) pairs and of the first and the last layer."""
        return residual_structure(self, stem=() if self.preactivation else (("conv1", "bn1"),))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of the images `x` (N, C, H, W)."""
        x = self.conv1(x)
        if not self.preactivation:
            x = self.relu(self.bn1(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        if self.preactivation:
            x = self.relu(self.bn1(x))
        x = self.fc(self.flatten(self.avgpool(x)))
        return x


class ResNetCifarOptions(TypedDict, total=False):
    """Options of `ResNetCifar` other than the depth."""

    shortcut: Shortcut
    num_classes: int
    in_channels: int
    preactivation: bool
    width: int
    activation: Activation
    shortcut_per_conv: bool


def resnet8(**options: Unpack[ResNetCifarOptions]) -> ResNetCifar:
    """ResNet-8: one block per stage."""
    return ResNetCifar(8, **options)


def resnet20(**options: Unpack[ResNetCifarOptions]) -> ResNetCifar:
    """ResNet-20: three blocks per stage."""
    return ResNetCifar(20, **options)


def resnet32(**options: Unpack[ResNetCifarOptions]) -> ResNetCifar:
    """ResNet-32: five blocks per stage."""
    return ResNetCifar(32, **options)


def resnet56(**options: Unpack[ResNetCifarOptions]) -> ResNetCifar:
    """ResNet-56: nine blocks per stage."""
    return ResNetCifar(56, **options)
