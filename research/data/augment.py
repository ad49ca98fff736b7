"""Batched augmentation on the device that holds the images: random crop, horizontal flip, cutout, normalisation.

The random numbers of a batch are one small integer tensor (`draw`), made on the CPU from a keyed generator and so equal
on every device; all else is a pure function of it. All five numbers of an image are always drawn: switching the
flip off leaves the crops as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FILLS = ("zero", "mean")


@dataclass(frozen=True)
class Augmentation:
    """Options of the training images: `padding` pixels before the crop, filled with `fill`; `flip`; `cutout` side."""

    padding: int = 0
    flip: bool = False
    cutout: int = 0
    fill: str = "zero"

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"data.padding={self.padding}: use 0 or more pixels, such as 4 for 32x32 images")
        if self.cutout < 0:
            raise ValueError(f"data.cutout={self.cutout}: use 0 (off) or the side of the square in pixels, such as 16")
        if self.fill not in FILLS:
            raise ValueError(f"data.fill={self.fill}: use one of {', '.join(FILLS)}")


def pad_images(images: Tensor, padding: int, value: Sequence[int]) -> Tensor:
    """Surround uint8 images (N, H, W, C) by `padding` pixels of `value` (one of 0..255 per channel)."""
    count, height, width, channels = images.shape
    padded = images.new_empty((count, height + 2 * padding, width + 2 * padding, channels))
    padded[:] = torch.tensor(value, dtype=torch.uint8, device=images.device)
    padded[:, padding : padding + height, padding : padding + width] = images
    return padded


def draw(count: int, offsets: tuple[int, int], size: int, generator: torch.Generator) -> Tensor:
    """Draw the random numbers of `count` images.

    Args:
        count: number of images.
        offsets: how many places the crop's top and its left edge can take.
        size: side of the crop in pixels, the range of the cutout's centre.
        generator: see `research.data.images.keyed_generator`.

    Returns:
        int64 (count, 5) on the CPU: top, left, flip (0 or 1), row and column of the cutout's centre.
    """
    limits = (*offsets, 2, size, size)
    return torch.stack([torch.randint(limit, (count,), generator=generator) for limit in limits], dim=1)


def crop_flip(images: Tensor, rows: Tensor, draws: Tensor, size: int, flip: bool) -> Tensor:
    """Crop a random square of each chosen image and mirror half of them; a gather of whole lines, not of pixels.

    Args:
        images: uint8 (N, H, W, C), already padded, contiguous.
        rows: int64 (B,), which images.
        draws: int64 (B, 5) of `draw`.
        size: side of the square.
        flip: whether the drawn flips are carried out.

    Returns:
        uint8 (B, size, size, C).
    """
    height, width, channels = images.shape[1:]
    count = len(rows)
    first_lines = rows * height + draws[:, 0]
    starts = (first_lines[:, None] + torch.arange(size, device=images.device)) * width + draws[:, 1, None]
    windows = images.reshape(-1).unfold(0, size * channels, channels)  # `size` pixels from every pixel on, no copy
    crops = windows.index_select(0, starts.view(-1)).view(count, size, size, channels)
    if not flip:
        return crops
    mirrored = crops.permute(0, 3, 1, 2).flip(3).permute(0, 2, 3, 1)  # torch has a fast path for NCHW alone
    chosen = torch.arange(count, device=images.device) + count * draws[:, 2]
    return torch.cat([crops, mirrored]).index_select(0, chosen)


def centre_crop(images: Tensor, rows: Tensor, size: int) -> Tensor:
    """Take the central square of side `size` of images (N, H, W, C) at `rows` (B,): (B, size, size, C)."""
    top, left = (images.shape[1] - size) // 2, (images.shape[2] - size) // 2
    return images.index_select(0, rows)[:, top : top + size, left : left + size]


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turn uint8 (B, H, W, C) into float32 (B, C, H, W) in channels_last memory: (x / 255 - mean) / std.

    `mean` and `std` are float32 (C). They are repeated along a line of pixels: twice as fast as broadcasting over C.
    """
    width = images.shape[2]
    lines = images.flatten(2).to(torch.float32)
    lines.div_(255).sub_(mean.repeat(width)).div_(std.repeat(width))
    return lines.view(images.shape).permute(0, 3, 1, 2)


def cutout(images: Tensor, draws: Tensor, size: int) -> Tensor:
    """Set a square of normalised images (B, C, H, W) to zero, their mean colour.

    The square has side `size` and a centre anywhere in the image; what lies outside is lost (DeVries and Taylor 2017,
    "Improved Regularization of Convolutional Neural Networks with Cutout", section 3.2).
    """
    height, width = images.shape[2:]
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    first_row, first_column = draws[:, 3, None] - size // 2, draws[:, 4, None] - size // 2
    in_rows = (rows >= first_row) & (rows < first_row + size)
    in_columns = (columns >= first_column) & (columns < first_column + size)
    return images.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0.0)
