"""A trainable scale on a layer's output, for quantizers whose values live on a fixed scale (EWGS)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def output_scale_ratio(output: Tensor, quantized_output: Tensor) -> Tensor:
    """``mean|output| / mean|quantized_output|``, 0-dim: the initial scale (cvlab-yonsei/EWGS); outputs of one shape."""
    return output.abs().mean() / torch.clamp(quantized_output.abs().mean(), min=torch.finfo(torch.float32).eps)


class OutputScale(nn.Module):
    """``y * |output_scale|`` in the ``output_quantizer`` slot of a layer; a bias of the layer is scaled too.

    Conversion gives one to every layer whose quantizers live on a fixed scale, unless the recipe names an output
    quantizer; `calibrate` initialises it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.output_scale = nn.Parameter(torch.ones(()))

    @torch.no_grad()
    def initialise(self, output: Tensor, quantized_output: Tensor) -> None:
        """Set the scale so that the mean magnitude of the layer's output is that of the float layer's."""
        self.output_scale.copy_(output_scale_ratio(output, quantized_output))

    def forward(self, y: Tensor) -> Tensor:
        """Scaled ``y``, same shape."""
        return y * self.output_scale.abs()
