"""ReLUs left out in front of quantizers that clip at zero themselves: two passes over memory less for each.

An unsigned quantizer gives ``max(x, 0)`` the code of ``x``, and its backward pass makes a mask anyway.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from research.quant.fused import WITH_CONVOLUTION
from research.quant.layers import QuantLayer, looked_at
from research.quant.quantizers.base import Quantizer


@dataclass(frozen=True)
class LeftOutReLU:
    """The forward pass of a ReLU whose output nothing but a quantized layer reads.

    In training it is the identity, if the layer's quantizer clips at zero in the fast path and nobody looks at a tensor
    between the two: not a hook of the ReLU, the layer or the quantizer. Else it is the ReLU.
    """

    relu: nn.ReLU
    layer: QuantLayer

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` or its positive part; the gradients behind the quantizer are the same."""
        return x if self.relu.training and torch.is_grad_enabled() and self.unseen(x) else nn.ReLU.forward(self.relu, x)

    def unseen(self, x: Tensor) -> bool:
        """Whether nobody could tell."""
        quantizer = self.layer.input_quantizer
        if quantizer is None or not quantizer.rectified or quantizer.kernels not in WITH_CONVOLUTION:
            return False
        if self.relu._forward_hooks or looked_at(self.layer) or looked_at(quantizer):
            return False
        grid = quantizer.fused_grid(x)
        return grid is not None and grid.rectified


def leave_out_relus(net: nn.Module, pairs: Iterable[tuple[str, str]]) -> None:
    """From now on the ReLUs of ``net`` in front of quantizers that clip at zero are left out where nobody can tell.

    Args:
        net: a converted network.
        pairs: names of activations and of the layers that alone read them (`Structure.activation_layer`).
    """
    for activation, name in pairs:
        relu, layer = net.get_submodule(activation), net.get_submodule(name)
        if type(relu) is nn.ReLU and isinstance(layer, QuantLayer) and isinstance(layer.input_quantizer, Quantizer):
            layer.input_quantizer.rectified = True
            relu.forward = LeftOutReLU(relu, layer)  # type: ignore[method-assign, assignment]
