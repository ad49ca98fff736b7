"""Networks whose second derivatives run on the kernels of the first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from research.quant.convolution import convolution_forward
from research.quant.normalisation import batchnorm_forward
from research.quant.passes import rebound


@contextmanager
def fast_double_backward(net: nn.Module) -> Iterator[None]:
    """Inside the block the convolutions and batch-norms of ``net`` have fast second derivatives.

    Same values, derivatives equal up to rounding. What stays as it is: convolutions that pad with anything but zeros,
    batch-norms in evaluation mode or without parameters or with a cumulative average. Under autocast convolutions run
    in its dtype; a batch-norm takes its second derivatives in that of its parameters.
    """
    with ExitStack() as stack:
        for module in net.modules():
            if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
                stack.enter_context(rebound(module, "_conv_forward", convolution_forward(module)))
            elif type(module) is nn.BatchNorm2d and module.affine and module.momentum is not None:
                stack.enter_context(rebound(module, "forward", batchnorm_forward(module)))
        yield
