"""Make the embedded set: a stratified part of Fashion-MNIST, 10,000 training and 2,000 test images.

`python -m research.data.make_embedded --source DIR --output FILE` reads the four IDX files in DIR (Debian's package
dataset-fashion-mnist) and writes the same bytes each time.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from research.data.embedded import EMBEDDED_FILE
from research.data.fashion_mnist import DEBIAN_FOLDER, load_fashion_mnist
from research.data.images import stratified_split

TRAIN_COUNT = 10_000
TEST_COUNT = 2_000
SEED = 0


def make_embedded(source: Path, output: Path) -> str:
    """Write the embedded set's file and return its SHA-256."""
    splits = load_fashion_mnist(source)
    arrays: dict[str, Any] = {}
    for part, images, count in (("train", splits.train, TRAIN_COUNT), ("test", splits.test, TEST_COUNT)):
        chosen = images.subset(stratified_split(images.labels, count, SEED)[1])
        arrays[f"{part}_images"] = chosen.images[..., 0].numpy()
        arrays[f"{part}_labels"] = chosen.labels.numpy().astype(np.uint8)
    with output.open("wb") as file:
        np.savez_compressed(file, **arrays)
    return hashlib.sha256(output.read_bytes()).hexdigest()


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m research.data.make_embedded", description=make_embedded.__doc__)
    parser.add_argument("--source", type=Path, default=DEBIAN_FOLDER, help="folder of the four .gz files (%(default)s)")
    parser.add_argument("--output", type=Path, default=EMBEDDED_FILE, help="file to write (%(default)s)")
    arguments = parser.parse_args()
    digest = make_embedded(arguments.source, arguments.output)
    print(f"{arguments.output} {arguments.output.stat().st_size} bytes sha256 {digest}")


if __name__ == "__main__":
    main()
