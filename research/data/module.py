"""ImageDataModule: the parts of an image set (train, validation, search, test) and their loaders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor

from research.data.augment import Augmentation
from research.data.cifar import CIFAR10, CIFAR100, download_cifar, load_cifar
from research.data.embedded import load_embedded
from research.data.fashion_mnist import load_fashion_mnist
from research.data.image_folder import load_image_folder
from research.data.images import ImageSet, ImageSplits, keyed_generator, stratified_split
from research.data.loader import ImageLoader
from research.data.synthetic import load_synthetic

NAMES = ("embedded", "fashion_mnist", "cifar10", "cifar100", "image_folder", "synthetic")
RELEASES = {release.name: release for release in (CIFAR10, CIFAR100)}
OPTIONS = {
    "image_folder": ("folder", "margin", "memory_limit_gib", "cache"),
    "synthetic": ("train", "test", "noise", "seed"),
}


class ImageDataModule(LightningDataModule):
    """Loads an image set by `name` and deals it out, in memory on the training device.

    The training images are split once, by class and by `split_seed`: first `validation` images, then `search` images
    are held out, then `limit_train` of the rest are kept. Batches lie on the trainer's device (without a trainer: on
    the CPU), and under several processes each loader gives this process its share.

    Args:
        name: embedded, fashion_mnist, cifar10, cifar100, image_folder or synthetic.
        root: folder of the data sets' files (`paths.data`).
        batch_size: images per training step over all processes.
        eval_batch_size: images per evaluation batch and process.
        validation: training images held out for validation; 0: none, and no validation loader.
        search: training images held out for `search_dataloader`, apart from validation.
        limit_train: keep only so many of the remaining training images.
        split_seed: of the parts.
        seed: of order, augmentation and calibration batches.
        padding: pixels added on each side before the random crop.
        flip: mirror half of the training images.
        cutout: side of the erased square, 0 for none.
        fill: padding colour, zero or mean.
        mean: per channel, of pixels in 0..1.
        std: per channel, of pixels in 0..1.
        num_classes: checked against the set (synthetic: made so).
        in_channels: checked against the set (synthetic: made so).
        image_size: side of the input; checked against the set (image_folder, synthetic: made so).
        download: fetch a missing CIFAR archive from its official page.
        options: further arguments of `load_image_folder` or `load_synthetic`.
    """

    def __init__(
        self,
        name: str,
        root: str,
        *,
        batch_size: int,
        eval_batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        num_classes: int,
        in_channels: int,
        image_size: int,
        validation: int = 0,
        search: int = 0,
        limit_train: int | None = None,
        split_seed: int = 0,
        seed: int = 0,
        padding: int = 0,
        flip: bool = False,
        cutout: int = 0,
        fill: str = "zero",
        download: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if name not in NAMES:
            raise ValueError(f"data.name={name}: use one of {', '.join(NAMES)}")
        if download and name not in RELEASES:
            raise ValueError(f"data.download=true: {name} has no download; leave it false")
        options = dict(options or {})
        if unknown := sorted(set(options) - set(OPTIONS.get(name, ()))):
            allowed = ", ".join(OPTIONS.get(name, ())) or "no options"
            raise ValueError(f"data.options.{unknown[0]}: unknown; {name} takes {allowed}")
        counts = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "limit_train": limit_train}
        for key, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"data.{key}={value}: use 1 or more")
        self._name = name
        self.root = Path(root)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.validation = validation
        self.search = search
        self.limit_train = limit_train
        self.split_seed = split_seed
        self.seed = seed
        self.augmentation = Augmentation(padding, flip, cutout, fill)
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.image_size = image_size
        self.download = download
        self.options = options
        self._parts: dict[str, ImageSet] = {}

    def prepare_data(self) -> None:
        """Download the set or decode it into its cache; Lightning calls this in one process per machine."""
        if self.download:
            download_cifar(RELEASES[self._name], self.root)
        if self._name == "image_folder":
            self._read()

    def setup(self, stage: str | None = None) -> None:
        """Read the set, check it against the config and split it; only once. Without a trainer, prepare it first."""
        if self._parts:
            return
        if self.trainer is None:
            self.prepare_data()
        splits = self._read()
        side, channels = splits.image_size, splits.train.images.shape[3]
        found = {"num_classes": splits.num_classes, "in_channels": channels, "image_size": side}
        for key, value in found.items():
            if getattr(self, key) != value:
                raise ValueError(f"data.{key}={getattr(self, key)}: {self._name} has {value}; use data.{key}={value}")
        train, validation = self._hold_out(splits.train, "validation", self.validation)
        train, search = self._hold_out(train, "search", self.search)
        if self.limit_train is not None:
            train = self._hold_out(train, "limit_train", self.limit_train)[1]
        self._parts = {"train": train, "validation": validation, "search": search, "test": splits.test}

    def train_dataloader(self) -> ImageLoader:
        """Augmented batches of the training part, shuffled, without the last incomplete batch of an epoch.

        They are not shuffled under `trainer.overfit_batches`, which asks for the same images in each epoch.
        """
        return self._training_loader("train")

    def search_dataloader(self) -> ImageLoader:
        """Like `train_dataloader`, of the part held out for search."""
        if self.search == 0:
            raise ValueError("data.search=0: a search needs images held out from training; use data.search=5000")
        return self._training_loader("search")

    def val_dataloader(self) -> ImageLoader | list[ImageLoader]:
        """Batches of the validation part, in order; an empty list where nothing is held out."""
        return self._evaluation_loader("validation") if self.validation else []

    def test_dataloader(self) -> ImageLoader:
        """Batches of the test set, in order."""
        return self._evaluation_loader("test")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """A batch that lies there already, as it is, without Lightning's search through its structure."""
        if all(isinstance(tensor, Tensor) and tensor.device == device for tensor in batch):
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def check_calibration(self, key: str, count: int, batch_size: int) -> None:
        """Raise `ValueError`, naming the config key of `count`, unless the training part has so many batches."""
        self.setup()
        images = len(self._parts["train"])
        if not 1 <= count * batch_size <= images:
            raise ValueError(
                f"{key}={count}: the training part has {images} images; use 1..{images // batch_size} batches of "
                f"{batch_size}, or smaller ones"
            )

    def calibration_batches(self, count: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        """Return `count` batches of different training images, not augmented, fixed by `seed`, equal on all ranks."""
        self.check_calibration("calibration.batches", count, batch_size)
        train = self._part("train")
        order = torch.randperm(len(train), generator=keyed_generator(self.seed, "calibration"))
        chosen = train.subset(order[: count * batch_size].to(train.labels.device))
        return list(
            ImageLoader(chosen, batch_size, size=self.image_size, mean=self.mean, std=self.std, device=self._device)
        )

    def measurement_batches(self, images: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        """Return `images` training images, not augmented, each class in proportion: the same ones for every `seed`.

        They depend on the parts (`split_seed`, `validation` ...) alone, so that runs measured on them can be compared.
        The last batch is smaller where `images` is no multiple of `batch_size`.
        """
        train = self._part("train")
        if not 1 <= images <= len(train) or batch_size < 1:
            raise ValueError(
                f"images={images} batch_size={batch_size}: the training part has {len(train)} images; "
                f"use 1..{len(train)}, and batches of 1 or more"
            )
        chosen = stratified_split(train.labels, images, self.split_seed)[1].to(train.labels.device)
        subset = train.subset(chosen)
        return list(
            ImageLoader(subset, batch_size, size=self.image_size, mean=self.mean, std=self.std, device=self._device)
        )

    def _read(self) -> ImageSplits:
        readers: dict[str, Callable[[], ImageSplits]] = {
            "embedded": load_embedded,
            "fashion_mnist": lambda: load_fashion_mnist(self.root),
            "cifar10": lambda: load_cifar(CIFAR10, self.root),
            "cifar100": lambda: load_cifar(CIFAR100, self.root),
            "image_folder": lambda: load_image_folder(self.root, self.image_size, **self.options),
            "synthetic": lambda: load_synthetic(
                num_classes=self.num_classes, in_channels=self.in_channels, image_size=self.image_size, **self.options
            ),
        }
        return readers[self._name]()

    def _hold_out(self, images: ImageSet, key: str, count: int) -> tuple[ImageSet, ImageSet]:
        if not 0 <= count <= len(images):
            raise ValueError(f"data.{key}={count}: {len(images)} training images are left; use 0..{len(images)}")
        keep, held = stratified_split(images.labels, count, self.split_seed)
        return (images if count == 0 else images.subset(keep)), images.subset(held)

    def _part(self, part: str) -> ImageSet:
        """Return a part, moved to the trainer's device for good."""
        self.setup()
        self._parts[part] = self._parts[part].to(self._device)
        return self._parts[part]

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def _placement(self) -> dict[str, Any]:
        rank, world_size = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        return {"device": self._device, "rank": rank, "world_size": world_size, "mean": self.mean, "std": self.std}

    def _training_loader(self, part: str) -> ImageLoader:
        placement = self._placement()
        share, rest = divmod(self.batch_size, placement["world_size"])
        if rest:
            raise ValueError(
                f"data.batch_size={self.batch_size}: not a multiple of {placement['world_size']} processes; "
                f"use {(share + 1) * placement['world_size']}"
            )
        return ImageLoader(
            self._part(part),
            share,
            size=self.image_size,
            shuffle=not getattr(self.trainer, "overfit_batches", 0),
            augment=self.augmentation,
            drop_last=True,
            seed=self.seed,
            stream=part,
            **placement,
        )

    def _evaluation_loader(self, part: str) -> ImageLoader:
        return ImageLoader(self._part(part), self.eval_batch_size, size=self.image_size, **self._placement())
