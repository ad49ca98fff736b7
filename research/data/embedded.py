"""The set that comes with the package: 10,000 training and 2,000 test images of Fashion-MNIST.

Made by `python -m research.data.make_embedded`. Licence: `LICENSE.fashion_mnist.txt` (MIT, Zalando SE).
"""

from __future__ import annotations

from pathlib import Path

from research.data.download import verify_checksum
from research.data.images import ImageSplits
from research.data.npz import load_npz

EMBEDDED_FILE = Path(__file__).with_name("fashion_mnist_12k.npz")
SHA256 = "96bf016fd45717bbf85776fd3ae450e9ec4a7bdb9377bcf674273fb15154d16a"
NUM_CLASSES = 10
REMEDY = "install the package again, or run python -m research.data.make_embedded"


def load_embedded(path: Path = EMBEDDED_FILE) -> ImageSplits:
    """Read the embedded set, after its checksum."""
    if not path.exists():
        raise ValueError(f"{path}: missing; {REMEDY}")
    verify_checksum(path, "sha256", SHA256, REMEDY)
    return load_npz(path, NUM_CLASSES, REMEDY)
