"""PReLU between two learned biases, per channel: the activation of ReActNet and N2UQ."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BiasPReLU(nn.Module):
    """``prelu(x + bias, slope) + shift``, per channel; (N, C, H, W) -> the same.

    Both biases start at 0. Put in the place of a ReLU by ``quantizer.replace``.

    Args:
        channels: C.
        slope: initial slope of the negative side (official code of N2UQ: 0.25); 0 starts as the ReLU.
    """

    def __init__(self, channels: int, slope: float = 0.25) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"BiasPReLU: channels={channels}: use the number of channels of the activation")
        self.bias = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), float(slope)))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """The activated ``x``."""
        return F.prelu(x + self.bias.view(-1, 1, 1), self.slope) + self.shift.view(-1, 1, 1)
