"""Labelled images as whole tensors, and seeded stratified parts of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """Images (uint8, N x H x W x C) and their labels (int64, N) on one device.

    Raises `ValueError` when shapes or dtypes are others than these.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(f"images must be uint8 N x H x W x C, not {self.images.dtype} {tuple(self.images.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must be int64, one for each of {len(self.images)} images, "
                f"not {self.labels.dtype} {tuple(self.labels.shape)}"
            )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def subset(self, indices: Tensor) -> ImageSet:
        """Return a copy of the images at `indices` (int64, M), in that order."""
        return ImageSet(self.images[indices], self.labels[indices])

    def to(self, device: torch.device | str) -> ImageSet:
        """Return the set on `device`; the same tensors if they lie there already."""
        return ImageSet(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageSplits:
    """What a reader returns: training and test set, the number of classes, and the side of the network's input.

    The stored images may be larger than `image_size`: evaluation then takes the centre, training a random crop.
    """

    train: ImageSet
    test: ImageSet
    num_classes: int
    image_size: int


def keyed_generator(seed: int, *key: int | str) -> torch.Generator:
    """Return the CPU random generator of one decision, named by `seed` and `key`.

    The 63-bit seed is taken from a SHA-256 of the key, so that any decision (the order of an epoch, the augmentation of
    one batch) can be made again alone, in any process, on any platform.
    """
    digest = hashlib.sha256("/".join(str(part) for part in (seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def stratified_split(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out `count` of N samples, each class in proportion to its size.

    Args:
        labels: int64, N.
        count: how many to hold out, 0..N. The classes' shares are rounded by largest remainder (ties: lower class).
        seed: the choice within a class depends on it and on `labels` only.

    Returns:
        `(keep, held)`: ascending int64 indices, N - count and count of them.
    """
    labels = labels.cpu()
    total = len(labels)
    if not 0 <= count <= total:
        raise ValueError(f"cannot hold out {count} of {total} samples: use 0..{total}")
    sizes = torch.bincount(labels)
    shares = sizes * count // max(total, 1)
    remainders = sizes * count - shares * total
    order = torch.argsort(remainders, descending=True, stable=True)
    shares[order[: count - int(shares.sum())]] += 1

    generator = keyed_generator(seed, "split")
    is_held = torch.zeros(total, dtype=torch.bool)
    for label, share in enumerate(shares.tolist()):
        members = torch.nonzero(labels == label).flatten()
        is_held[members[torch.randperm(len(members), generator=generator)[:share]]] = True
    return torch.nonzero(~is_held).flatten(), torch.nonzero(is_held).flatten()
