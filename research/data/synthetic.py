"""Small labelled images made from a seed: a coarse colour pattern per class under uniform noise.

For tests and debugging. Integer arithmetic only: the same bytes on every platform.
"""

from __future__ import annotations

import torch

from research.data.images import ImageSet, ImageSplits, keyed_generator

COARSE = 4


def load_synthetic(
    *,
    train: int = 512,
    test: int = 256,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 16,
    noise: int = 64,
    seed: int = 0,
) -> ImageSplits:
    """Make `train` and `test` images of side `image_size`.

    A class is a random pattern of 4 x 4 squares; an image is its pattern plus noise from -`noise`..`noise`. Classes
    take turns, so that every part is balanced.
    """
    for key, value in (("train", train), ("test", test)):
        if value < num_classes:
            raise ValueError(f"data.options.{key}={value}: use at least one image for each of {num_classes} classes")
    if not 0 <= noise <= 255:
        raise ValueError(f"data.options.noise={noise}: use 0..255")
    shape = (num_classes, COARSE, COARSE, in_channels)
    coarse = torch.randint(256, shape, generator=keyed_generator(seed, "synthetic", "patterns"))
    cells = torch.arange(image_size) * COARSE // image_size
    patterns = coarse[:, cells][:, :, cells]

    def part(name: str, count: int) -> ImageSet:
        labels = torch.arange(count) % num_classes
        generator = keyed_generator(seed, "synthetic", name)
        shift = torch.randint(-noise, noise + 1, (count, image_size, image_size, in_channels), generator=generator)
        return ImageSet((patterns[labels] + shift).clamp(0, 255).to(torch.uint8), labels)

    return ImageSplits(part("train", train), part("test", test), num_classes, image_size)
