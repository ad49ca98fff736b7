"""Clipping to the limits of the codes, and where the gradient counts a value as inside."""

from __future__ import annotations

import torch
from torch import Tensor

MASKS = ("clip_first", "round_first")


def check_mask(mask: str) -> str:
    """``mask`` itself.

    Raises:
        ValueError: unknown mask.
    """
    if mask not in MASKS:
        raise ValueError(f"quantizer.*.options.mask={mask!r}: use {' or '.join(MASKS)}")
    return mask


def clip_codes(u: Tensor, low: Tensor, high: Tensor, mask: str = "clip_first") -> Tensor:
    """Clip ``u`` (in units of codes, not yet rounded) so that rounding it gives a code in ``[low, high]``.

    ``clip_first``: a value is inside, and has derivative 1, where ``low <= u <= high`` (LSQ).
    ``round_first``: where ``low <= round(u) <= high``, half a step wider; such a value keeps itself (MQBench and
    PyTorch's fake-quantize operators). The codes are the same.
    """
    clipped = torch.clamp(u, low, high)
    if mask == "clip_first":
        return clipped
    rounded = torch.round(u)
    return torch.where((rounded >= low) & (rounded <= high), u, clipped)
