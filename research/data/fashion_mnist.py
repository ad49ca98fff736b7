"""Fashion-MNIST from its four gzip-compressed IDX files.

Set: Xiao, Rasul, Vollgraf 2017, https://github.com/zalandoresearch/fashion-mnist. IDX: a big-endian int32 magic number
(0x0801 labels, 0x0803 images: unsigned bytes of 1 or 3 dimensions), an int32 per dimension, then the bytes.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch

from research.data.images import ImageSet, ImageSplits
from research.data.npz import check_labels

NUM_CLASSES = 10
SIDE = 28
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
PREFIXES = {"train": ("train", 60_000), "test": ("t10k", 10_000)}
SOURCE = "https://github.com/zalandoresearch/fashion-mnist"


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read a gzip-compressed IDX file of unsigned bytes that must have `shape`; returns a writable uint8 array."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: not readable as gzip ({error}); get it again from {SOURCE}") from error
    header = np.array([0x0800 + len(shape), *shape], dtype=">i4").tobytes()
    if content[: len(header)] != header or len(content) != len(header) + math.prod(shape):
        raise ValueError(f"{path}: not an IDX file of {'x'.join(map(str, shape))} bytes; get it again from {SOURCE}")
    return np.frombuffer(content, dtype=np.uint8, offset=len(header)).reshape(shape).copy()


def load_fashion_mnist(root: Path) -> ImageSplits:
    """Read the set from `root`, `root`/fashion-mnist, or where Debian's package dataset-fashion-mnist puts it."""
    folders = (root, root / "fashion-mnist", DEBIAN_FOLDER)
    folder = next((folder for folder in folders if (folder / "train-images-idx3-ubyte.gz").exists()), None)
    if folder is None:
        raise ValueError(
            f"data=fashion_mnist: no train-images-idx3-ubyte.gz in {root} or {root / 'fashion-mnist'}; "
            f"apt-get install dataset-fashion-mnist, or get the four .gz files from {SOURCE} and give paths.data=DIR"
        )
    parts = {}
    for part, (prefix, count) in PREFIXES.items():
        path = folder / f"{prefix}-images-idx3-ubyte.gz"
        images = torch.from_numpy(read_idx(path, (count, SIDE, SIDE)))[..., None]
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", (count,)).astype(np.int64)
        parts[part] = ImageSet(images, torch.from_numpy(labels))
        check_labels(parts[part], NUM_CLASSES, folder)
    return ImageSplits(parts["train"], parts["test"], NUM_CLASSES, image_size=SIDE)
