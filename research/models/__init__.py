"""Float networks whose every operation is a named module, and which state their own structure."""

from research.models.checkpoint import load_float_checkpoint
from research.models.mobilenet_v2 import mobilenet_v2
from research.models.resnet import resnet18
from research.models.resnet_cifar import ResNetCifar, resnet8, resnet20, resnet32, resnet56
from research.models.structure import FloatModel, Structure
from research.models.vgg import vgg16_bn, vgg_small

__all__ = [
    "FloatModel",
    "ResNetCifar",
    "Structure",
    "load_float_checkpoint",
    "mobilenet_v2",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet56",
    "resnet8",
    "vgg16_bn",
    "vgg_small",
]
