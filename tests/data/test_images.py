import pytest
import torch

from research.data import ImageSet, keyed_generator, stratified_split


def test_image_set_refuses_other_shapes_and_dtypes():
    images, labels = torch.zeros(4, 2, 2, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    assert len(ImageSet(images, labels)) == 4
    for wrong in ((images.float(), labels), (images[..., 0], labels), (images, labels.int()), (images, labels[:3])):
        with pytest.raises(ValueError, match="must be"):
            ImageSet(*wrong)


def test_subset_keeps_order_and_copies():
    images = torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2, 1)
    part = ImageSet(images, torch.tensor([5, 6, 7])).subset(torch.tensor([2, 0]))
    assert part.labels.tolist() == [7, 5]
    assert torch.equal(part.images, images[[2, 0]])


def test_generator_depends_on_every_part_of_the_key_only():
    def first(*key):
        return int(torch.randint(1 << 40, (), generator=keyed_generator(*key)))

    assert first(1, "a", 2) == first(1, "a", 2)
    assert len({first(1, "a", 2), first(2, "a", 2), first(1, "b", 2), first(1, "a", 3), first(1, "a", 23)}) == 5
    assert keyed_generator(0, "train", "order", 0).initial_seed() == 2813081678136487167


def test_stratified_split_is_proportional_disjoint_and_seeded():
    labels = torch.arange(300)[torch.randperm(300, generator=keyed_generator(3))] % 10
    labels[labels == 9] = 0
    keep, held = stratified_split(labels, 50, seed=1)
    assert sorted(torch.cat([keep, held]).tolist()) == list(range(300))
    assert torch.bincount(labels[held]).tolist() == [10, 5, 5, 5, 5, 5, 5, 5, 5]
    assert torch.equal(held, held.sort().values)
    assert torch.equal(stratified_split(labels, 50, seed=1)[1], held)
    assert not torch.equal(stratified_split(labels, 50, seed=2)[1], held)


def test_stratified_split_rounds_by_largest_remainder():
    labels = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    assert torch.bincount(labels[stratified_split(labels, 4, seed=0)[1]]).tolist() == [2, 1, 1]
    for count in range(11):
        keep, held = stratified_split(labels, count, seed=0)
        assert (len(keep), len(held)) == (10 - count, count)


@pytest.mark.parametrize("count", [-1, 11])
def test_stratified_split_refuses_impossible_counts(count):
    with pytest.raises(ValueError, match=r"use 0\.\.10"):
        stratified_split(torch.zeros(10, dtype=torch.int64), count, seed=0)
