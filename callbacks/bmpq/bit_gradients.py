"""Gradients with respect to the bits of a weight, and their normalised size, from which BMPQ ranks layers.

Two's complement: a code of q bits is ``k = sum_i c_i B_i`` with the digits B and ``c = [-2^(q-1), 2^(q-2), .., 2, 1]``.
With the digits taken as continuous, ``dL/dB_i = dL/dw_q s c_i``. So the gradient of the bits is that of the weight
times a constant, and no norm of it needs a tensor of its shape.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Norm = Literal["raw", "per_bit"]
NORMS: tuple[Norm, ...] = get_args(Norm)


def bit_weights(bits: int) -> Tensor:
    """``c``: what each digit of a two's-complement code counts, most significant first; float64 of shape (bits,)."""
    powers = 2.0 ** torch.arange(bits - 1, -1, -1, dtype=torch.float64)
    powers[0] = -powers[0]
    return powers


def bit_gradient(gradient: Tensor, scale: Tensor, bits: int) -> Tensor:
    """``dL/dB = dL/dw_q s c``: the definition, of shape (*weight.shape, bits).

    Args:
        gradient: at the quantized weight.
        scale: s, broadcastable against it.
        bits: q.
    """
    return (gradient * scale).unsqueeze(-1) * bit_weights(bits).to(gradient)


def bit_norm(bits: int) -> float:
    """``||c||_2 = sqrt((4^q - 1) / 3)``."""
    return math.sqrt((4**bits - 1) / 3)


def step_sensitivity(gradient: Tensor, scale: Tensor) -> Tensor:
    """``mean |dL/dw_q| s``, 0-dim: how much the loss minds one step of the grid. The normalised bit gradient (NBG)
    with ``per_bit``; times `bit_norm` it is the one with ``raw``, the mean over the weights of ``||dL/dB||_2``.

    The paper's own normalisation is not known to us; both forms are reconstructions.
    """
    return (gradient * scale).abs().mean()
