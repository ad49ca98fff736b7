"""The straight-through estimator in its reference form: where a rounded value meets the gradient of something else.

The *detach form*, ``value + (surrogate - surrogate.detach())``: the forward pass gives ``value`` exactly (the bracket
is zero), every derivative of any order is that of ``surrogate``. A hand-written ``autograd.Function`` that saves
tensors for its backward has the same first derivatives and, in general, wrong second ones (its Hessian is not even
symmetric). Those of `research.quant.fused` are tested against this form: they refuse a second derivative, or are
linear in the upstream gradient (``affine``), so that there is none to get wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """``value`` in the forward pass, ``surrogate`` in every derivative (Bengio, Leonard, Courville 2013).

    Both have the same shape; exact in the forward pass for finite ``surrogate``.
    """
    return value.detach() + (surrogate - surrogate.detach())


def round_ste(x: Tensor) -> Tensor:
    """Half-to-even rounding with the identity as its derivative."""
    return straight_through(torch.round(x), x)


def scale_gradient(x: Tensor, factor: Tensor | float) -> Tensor:
    """``x`` in the forward pass, its gradient multiplied by ``factor`` (LSQ, section 2.2). Exact in the forward."""
    return straight_through(x, x * factor)
