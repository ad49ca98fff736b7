"""What every network of this room states about itself: the facts that tracing would otherwise have to find."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Structure:
    """Module names of a network, as `model.get_submodule` takes them, in forward order.

    Attributes:
        blocks: the units of block-wise methods: residual blocks, or conv-bn-activation groups in a plain network.
            A layer outside every block (stem, head, classifier) is a unit by itself.
        conv_bn: (convolution, batch-norm) pairs in which the norm is the only reader of the convolution's output, so
            that it can be folded into the convolution. Pre-activation networks have norms that stand in no pair.
        first: the layer that reads the image.
        last: the layer that writes the logits.
        activation_layer: (activation, layer) pairs in which the layer is the only reader of the activation's output.
    """

    blocks: tuple[str, ...]
    conv_bn: tuple[tuple[str, str], ...]
    first: str
    last: str
    activation_layer: tuple[tuple[str, str], ...] = ()


class FloatModel(nn.Module, ABC):
    """Base of all float networks: images (N, C, H, W) -> logits (N, num_classes).

    Every operation of `forward` is a named leaf module and is called exactly once. `structure()` still holds after
    layers were replaced by quantized ones of the same names.
    """

    @abstractmethod
    def structure(self) -> Structure:
        """Names of the blocks, of the (conv, bn) pairs and of the first and the last layer."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of the images `x` (N, C, H, W)."""

    def initialise_weights(self) -> None:
        """Draw every convolution weight from He's normal distribution, fan-out form (arXiv:1502.01852, eq. 14)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
