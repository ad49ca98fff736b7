"""ImageNet-style folders (`train/<class>/*.JPEG`, `val/<class>/*.JPEG`) as whole tensors.

Each image is decoded once: its shorter side is resized to `image_size + margin`, the centre square is kept. The squares
go to one `.npy` file per part in a cache folder; later runs read that. `val` serves as the test set: a validation part
is held out of `train`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from research.data.images import ImageSet, ImageSplits

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp")
GIB = 1 << 30


def load_image_folder(
    root: Path,
    image_size: int,
    *,
    folder: str = ".",
    margin: int = 32,
    memory_limit_gib: float = 64.0,
    cache: str | None = None,
) -> ImageSplits:
    """Read an image folder.

    Args:
        root: folder of the data sets' files.
        image_size: side of the network's input.
        folder: below `root` (or absolute), holds `train` and `val`, each with one folder per class; classes are
            numbered in alphabetical order.
        margin: the stored squares are this much larger, room for random crops (256 and 224 for ImageNet: 32).
        memory_limit_gib: refuse to hold more than this.
        cache: folder of the decoded squares; by default `folder`/decoded.
    """
    source = root / folder
    side = image_size + margin
    classes = _classes(source, "train")
    parts = {part: _list_images(source, part, classes) for part in ("train", "val")}
    needed = sum(len(paths) for paths, _ in parts.values()) * side * side * 3 / GIB
    if needed > memory_limit_gib:
        raise ValueError(
            f"data.options.memory_limit_gib={memory_limit_gib:g}: the images of {source} take {needed:.1f} GiB at "
            f"{side}x{side}; use a smaller data.image_size or data.options.margin, or allow {needed + 1:.0f}"
        )
    store = source / "decoded" if cache is None else Path(cache)
    sets = [
        ImageSet(_decoded(store, part, source, paths, side), torch.tensor(labels))
        for part, (paths, labels) in parts.items()
    ]
    return ImageSplits(sets[0], sets[1], len(classes), image_size)


def decode_square(path: Path, side: int) -> np.ndarray:
    """Decode an image, resize its shorter side to `side` (bilinear), keep the centre: uint8 (side, side, 3), RGB."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (side, side))
            scale = side / min(image.size)
            size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
            resized = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: not readable as an image ({error}); replace or remove it") from error
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return np.asarray(resized.crop((left, top, left + side, top + side)))


def _classes(root: Path, part: str) -> list[str]:
    if not (root / part).is_dir():
        raise ValueError(
            f"data=imagenet_folder: no folder {root / part}; give paths.data=DIR or FLATBIT_DATA=DIR, and by "
            "data.options.folder the folder in it that holds train/<class>/*.JPEG and val/<class>/*.JPEG"
        )
    return sorted(path.name for path in (root / part).iterdir() if path.is_dir())


def _list_images(root: Path, part: str, classes: Sequence[str]) -> tuple[list[Path], list[int]]:
    if unknown := sorted(set(_classes(root, part)) - set(classes)):
        raise ValueError(f"{root / part / unknown[0]}: a class without a folder in {root / 'train'}; add or remove it")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(path for path in (root / part / name).glob("*") if path.suffix.lower() in SUFFIXES)
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise ValueError(f"{root / part}: no images ({', '.join(SUFFIXES)}); use {part}/<class>/*.JPEG")
    return paths, labels


def _decoded(store: Path, part: str, root: Path, paths: Sequence[Path], side: int) -> torch.Tensor:
    """Return the squares (N, side, side, 3), mapped from the cache file, which is made first where there is none."""
    listing = "\n".join(f"{path.relative_to(root)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths)
    digest = hashlib.sha256(listing.encode()).hexdigest()[:12]
    file = store / f"{part}_{side}_{digest}.npy"
    if not file.exists():
        _decode_all(file, paths, side)
    try:
        return torch.from_numpy(np.load(file, mmap_mode="c", allow_pickle=False))
    except (EOFError, OSError, ValueError) as error:
        raise ValueError(f"{file}: corrupt cache ({error}); delete it") from error


def _decode_all(file: Path, paths: Sequence[Path], side: int) -> None:
    partial = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        squares = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(len(paths), side, side, 3))
    except OSError as error:
        raise ValueError(f"{file.parent}: not writable ({error}); give data.options.cache=DIR") from error
    try:
        with ThreadPoolExecutor(os.cpu_count()) as executor:
            for index, square in enumerate(executor.map(lambda path: decode_square(path, side), paths)):
                squares[index] = square
        squares.flush()
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
