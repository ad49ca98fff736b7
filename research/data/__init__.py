"""Image sets as whole tensors, with batched augmentation on the training device and no worker processes."""

from typing import TYPE_CHECKING, Any

from research.data.augment import Augmentation
from research.data.images import ImageSet, ImageSplits, keyed_generator, stratified_split
from research.data.loader import ImageLoader

if TYPE_CHECKING:
    from research.data.module import ImageDataModule

__all__ = [
    "Augmentation",
    "ImageDataModule",
    "ImageLoader",
    "ImageSet",
    "ImageSplits",
    "keyed_generator",
    "stratified_split",
]


def __getattr__(name: str) -> Any:
    """Import `ImageDataModule`, and with it Lightning, only where it is used."""
    if name == "ImageDataModule":
        from research.data.module import ImageDataModule

        return ImageDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
