"""The `.npz` form of an image set: train_images, train_labels, test_images, test_labels, all uint8 or integer."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from research.data.images import ImageSet, ImageSplits

CORRUPT = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, OSError, ValueError)


def load_npz(path: Path, num_classes: int, remedy: str) -> ImageSplits:
    """Read an `.npz` file of uint8 images (N, H, W, C) or (N, H, W) and integer labels (N); never unpickles.

    Args:
        path: the file.
        num_classes: labels must lie in 0..num_classes - 1.
        remedy: what a user does about a corrupt file; ends the error's line.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            train, test = (_image_set(arrays[f"{part}_images"], arrays[f"{part}_labels"]) for part in ("train", "test"))
    except CORRUPT as error:
        reason = " ".join(str(error).split()) if zipfile.is_zipfile(path) else "no zip archive"
        raise ValueError(f"{path}: corrupt, or no set of images ({reason}); {remedy}") from error
    for part in (train, test):
        check_labels(part, num_classes, path)
    return ImageSplits(train, test, num_classes, image_size=train.images.shape[1])


def check_labels(part: ImageSet, num_classes: int, path: Path) -> None:
    """Raise `ValueError` unless every label lies in 0..num_classes - 1."""
    if len(part) and not (int(part.labels.min()) >= 0 and int(part.labels.max()) < num_classes):
        raise ValueError(f"{path}: labels {int(part.labels.min())}..{int(part.labels.max())} of {num_classes} classes")


def _image_set(images: np.ndarray, labels: np.ndarray) -> ImageSet:
    pixels = torch.from_numpy(images)
    return ImageSet(pixels if pixels.ndim == 4 else pixels[..., None], torch.from_numpy(labels.astype(np.int64)))
