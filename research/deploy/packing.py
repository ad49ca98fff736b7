"""Packing: integer codes of 1 to 8 bits to bytes and back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pack_codes(codes: Tensor, bits: int, qmin: int, step: int = 1) -> Tensor:
    """Codes of any shape as a dense row of ``bits``-wide fields, C order, the least significant bit first.

    The field of a code ``q`` is the unsigned number ``(q - qmin) / step``; field ``i`` fills the bits ``i * bits`` to
    ``(i + 1) * bits - 1`` of the stream, and bit ``j`` of the stream is bit ``j % 8`` of byte ``j // 8``. The last byte
    is filled up with zeros.

    Args:
        codes: integers ``qmin, qmin + step, ..., qmin + (2^bits - 1) * step``.
        bits: width of a field, 1 to 8.
        qmin: least code.
        step: distance of neighbouring codes (2 for the odd codes of a mid-rise grid).

    Returns:
        uint8, shape ``(ceil(codes.numel() * bits / 8),)``.

    Raises:
        ValueError: a width outside 1 to 8, or a code that the fields cannot hold.
    """
    _check_bits(bits)
    offset = codes.detach().cpu().reshape(-1).to(torch.int64) - qmin
    field = torch.div(offset, step, rounding_mode="floor")
    if codes.numel() and (bool((field * step != offset).any()) or int(field.min()) < 0 or int(field.max()) >> bits):
        raise ValueError(f"codes {int(codes.min())}..{int(codes.max())} do not fit {bits} bits from {qmin} by {step}")
    planes = np.unpackbits(field.to(torch.uint8).numpy()[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(planes.reshape(-1), bitorder="little"))


def unpack_codes(data: Tensor, bits: int, qmin: int, shape: Sequence[int], step: int = 1) -> Tensor:
    """Inverse of `pack_codes`.

    Returns:
        int32 codes of ``shape``.

    Raises:
        ValueError: a width outside 1 to 8, or a number of bytes that is not that of ``shape``.
    """
    _check_bits(bits)
    count = math.prod(shape)
    if data.shape != (packed_size(count, bits),):
        raise ValueError(f"{data.numel()} bytes do not hold {count} codes of {bits} bits")
    planes = np.unpackbits(data.cpu().numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    fields = np.packbits(planes, axis=1, bitorder="little").reshape(-1)
    return torch.from_numpy(fields.astype(np.int32)).mul_(step).add_(qmin).reshape(tuple(shape))


def packed_size(count: int, bits: int) -> int:
    """Bytes of ``count`` packed codes."""
    return (count * bits + 7) // 8


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits}: codes are packed at 1 to 8 bits")
