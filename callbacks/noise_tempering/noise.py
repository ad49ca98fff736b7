"""Noise in proportion to each element's quantization error."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

NoiseDist = Literal["uniform", "one", "bernoulli", "gauss", "blind"]


def uniform_like(x: Tensor) -> Tensor:
    """Numbers from U(-1, 1), shape, strides and dtype of ``x``, which is dense.

    Two come from one draw of 64 bits: on processors drawing costs as much as all else that a quantizer does.
    """
    draws = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 2),), device=x.device)
    numbers = (draws.view(torch.int32)[: x.numel()].to(x.dtype) + 0.5) * 2.0**-31
    return numbers.as_strided(x.shape, x.stride())


def draw(dist: NoiseDist, error: Tensor, scale: Tensor) -> Tensor:
    """Noise at full strength, shape of ``error``: ``error * u``, with ``u`` fresh from the default generator.

    ``uniform`` U(-1, 1); ``one`` 1; ``bernoulli`` 0 or 1, p = 1/2; ``gauss`` N(0, 1/3). ``blind`` knows nothing of the
    error: ``scale * U(-1/2, 1/2)`` on every element, clipped ones included (pseudo quantization noise).

    Args:
        dist: distribution of ``u``.
        error: ``clip(v) - Q(v)``, in units of the tensor; 0 where clipped.
        scale: width of a bin, broadcastable against ``error``.
    """
    if dist == "uniform":
        return error * uniform_like(error)
    if dist == "one":
        return error
    if dist == "bernoulli":
        return error * (uniform_like(error) < 0).to(error.dtype)
    if dist == "gauss":
        return error * torch.randn_like(error) * math.sqrt(1 / 3)
    return scale * (0.5 * uniform_like(error))
