"""ImageLoader: batches of a whole-tensor image set, made on its device, without worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from research.data.augment import Augmentation, centre_crop, crop_flip, cutout, draw, normalise, pad_images
from research.data.images import ImageSet, keyed_generator


class ImageLoader:
    """Iterates over an `ImageSet` in batches `(x, y)`: x float32 NCHW (channels_last), y int64, on the set's device.

    The *global* batch of `batch_size * world_size` images is drawn and augmented from one key, and each rank computes
    its contiguous slice: two processes of b images see what one process of 2b images sees, bit for bit. Every rank
    makes the same number of batches and no image comes twice; a last incomplete global batch is shared out evenly, and
    when it has fewer images than there are ranks it is added to the batch before it.

    Epochs are counted by the caller (`set_epoch`, as with `torch.utils.data.DistributedSampler`; Lightning does it).
    `state_dict` holds the epoch and the batches yielded in it; after `load_state_dict` the next iteration goes on
    there.

    Args:
        images: the set; moved to `device`.
        batch_size: images per rank and batch.
        size: side of the network's input; by default that of the images.
        shuffle: a new order for each epoch.
        augment: random crop, flip and cutout; without it the centre of each image.
        drop_last: leave out the last incomplete global batch.
        seed: of order and augmentation.
        stream: separates loaders with one seed.
        mean: per channel, of pixels in 0..1.
        std: per channel, of pixels in 0..1.
        device: where the batches are made.
        rank: of this process.
        world_size: number of processes.
    """

    batch_sampler = None  # Lightning looks for this attribute wherever there is a `sampler`

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        *,
        size: int | None = None,
        shuffle: bool = False,
        augment: Augmentation | None = None,
        drop_last: bool = False,
        seed: int = 0,
        stream: str = "train",
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        channels = images.images.shape[3]
        if len(mean) != channels or len(std) != channels:
            raise ValueError(
                f"data.mean={list(mean)}, data.std={list(std)}: use {channels} values each, one per channel"
            )
        self.images = images.to(device)
        self.batch_size = batch_size
        self.size = images.images.shape[1] if size is None else size
        self.shuffle = shuffle
        self.augment = augment
        self.drop_last = drop_last
        self.seed = seed
        self.stream = stream
        self.rank = rank
        self.world_size = world_size
        self._mean = torch.tensor(mean, dtype=torch.float32, device=device)
        self._std = torch.tensor(std, dtype=torch.float32, device=device)
        if augment is not None and augment.padding:
            value = [round(255 * part) for part in mean] if augment.fill == "mean" else [0] * channels
            self.images = replace(self.images, images=pad_images(self.images.images, augment.padding, value))
        self._epoch = 0
        self._batches = 0
        self._resume_at = 0
        if len(self) == 0:
            raise ValueError(
                f"data.batch_size={batch_size * world_size}: no full batch in {len(images)} images; "
                f"use {max(len(images), 1)} or less"
            )

    @property
    def sampler(self) -> ImageLoader:
        """The object whose `set_epoch` Lightning calls before each epoch: the loader itself."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Start `epoch` with the next iteration; a position loaded within this very epoch is kept."""
        if epoch != self._epoch:
            self._epoch, self._batches, self._resume_at = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of batches yielded in it."""
        return {"epoch": self._epoch, "batches": self._batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Make the next iteration go on after the batches that `state` counts."""
        if not 0 <= state["batches"] <= len(self):
            raise ValueError(
                f"data.batch_size={self.batch_size * self.world_size}: the checkpoint stands at batch "
                f"{state['batches']} of an epoch of {len(self)}; use the batch size and data parts it was saved with"
            )
        self._epoch, self._batches, self._resume_at = state["epoch"], state["batches"], state["batches"]

    def __len__(self) -> int:
        """Return the number of batches of an epoch, equal on all ranks."""
        full, tail = divmod(len(self.images), self.batch_size * self.world_size)
        return full if self.drop_last or tail < self.world_size else full + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of the current epoch, from the loaded position if there is one."""
        first, self._resume_at = self._resume_at, 0
        order = self._order()
        for index in range(first, len(self)):
            batch = self._batch(order, index)
            self._batches = index + 1
            yield batch

    def _order(self) -> Tensor:
        device = self.images.labels.device
        if not self.shuffle:
            return torch.arange(len(self.images), device=device)
        generator = keyed_generator(self.seed, self.stream, "order", self._epoch)
        return torch.randperm(len(self.images), generator=generator).to(device)

    def _batch(self, order: Tensor, index: int) -> tuple[Tensor, Tensor]:
        full = self.batch_size * self.world_size
        start = index * full
        is_last = index == len(self) - 1 and not self.drop_last
        count = len(order) - start if is_last else full
        mine = slice(self.rank * count // self.world_size, (self.rank + 1) * count // self.world_size)
        rows = order[start : start + count][mine]
        labels = self.images.labels[rows]
        pixels = self.images.images
        if self.augment is None:
            return normalise(centre_crop(pixels, rows, self.size), self._mean, self._std), labels
        generator = keyed_generator(self.seed, self.stream, "augment", self._epoch, index)
        offsets = (pixels.shape[1] - self.size + 1, pixels.shape[2] - self.size + 1)
        draws = draw(count, offsets, self.size, generator)[mine].to(pixels.device)
        cropped = crop_flip(pixels, rows, draws, self.size, self.augment.flip)
        batch = normalise(cropped, self._mean, self._std)
        return (cutout(batch, draws, self.augment.cutout) if self.augment.cutout else batch), labels
