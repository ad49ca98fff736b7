"""The images that curvature is measured on: plain, fixed, the same for every seed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from research.curvature.batches import FixedBatches
from tests.curvature.small import CUTS, small_batches
from tests.learning.tiny import make_data


def test_the_images_are_fixed_by_the_split_alone() -> None:
    first, other = (FixedBatches.of(make_data(seed=seed), 24, 16) for seed in (0, 5))
    for one, two in zip(first, other, strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert [len(targets) for _, targets in first] == [16, 8] and first.samples == 24
    apart = FixedBatches.of(make_data(split_seed=1), 24, 16)
    assert not torch.equal(apart[0][0], first[0][0])


def test_the_images_are_training_images_as_they_are() -> None:
    data = make_data()
    images = torch.cat([x for x, _ in FixedBatches.of(data, 32, 16)])
    plain = torch.cat([x for x, _ in data.calibration_batches(2, 16)])
    assert len(images) == len(plain) == 32, "the whole training part"
    assert {tuple(x.flatten().tolist()) for x in images} == {tuple(x.flatten().tolist()) for x in plain}


def test_every_class_has_its_share() -> None:
    labels = torch.cat([y for _, y in FixedBatches.of(make_data(options={"train": 400, "test": 16}), 40, 40)])
    assert torch.bincount(labels).tolist() == [10, 10, 10, 10]


def test_the_record_says_where_they_come_from() -> None:
    settings = FixedBatches.of(make_data(), 24, 16).settings
    assert settings == {"part": "train", "augmented": False, "images": 24, "batch_size": 16}


@pytest.mark.parametrize(("images", "batch_size"), [(33, 16), (0, 16), (8, 0)])
def test_more_than_there_is(images: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match=rf"images={images} batch_size={batch_size}: the training part has 32"):
        FixedBatches.of(make_data(), images, batch_size)


def test_batches_move_and_change_their_dtype() -> None:
    batches = small_batches().to(torch.device("cpu"), torch.float32)
    assert [(x.dtype, y.dtype) for x, y in batches] == [(torch.float32, torch.int64)] * 2
    assert len(batches) == len(CUTS) and batches[:1][0][1].shape == (CUTS[0],)
    assert replace(batches, settings={"images": 7}).settings == {"images": 7}
