"""Parameter-free leaf modules: the tensor operations of a network that torch.nn offers only as functions.

A network of this room calls nothing but modules in `forward`, so that a recipe can name any tensor and an exporter can
rebuild the graph by recording which leaf module consumed which tensor.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Add(nn.Module):
    """The residual add: `a + b`, two tensors of one shape."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Sum of `a` and `b`."""
        return a + b


class PadShortcut(nn.Module):
    """Option A shortcut (He et al. 2015, arXiv:1512.03385, section 3.3): no parameters, new channels are zero.

    (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)): every `stride`-th pixel, then
    `(out_channels - in_channels) / 2` zero channels on each side. An odd difference has no such form: ValueError.
    """

    def __init__(self, stride: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        if out_channels < in_channels or (out_channels - in_channels) % 2:
            raise ValueError(
                f"model.shortcut=A: {in_channels} channels cannot be padded evenly to {out_channels}; use shortcut=B"
            )
        self.stride = stride
        self.padding = (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Subsample the pixels of `x` and pad its channels."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))

    def extra_repr(self) -> str:
        """Stride and padding, shown by `print(model)`."""
        return f"stride={self.stride}, padding={self.padding}"
