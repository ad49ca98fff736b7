import pytest
import torch

from research.data import Augmentation, ImageLoader, ImageSet, keyed_generator

COUNT = 53


@pytest.fixture(scope="module")
def images():
    pixels = torch.randint(256, (COUNT, 8, 8, 3), generator=keyed_generator(0), dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(COUNT))


def make(images, batch_size=8, **options):
    options = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)} | options
    return ImageLoader(images, batch_size, **options)


def training(images, batch_size=8, **options):
    augment = Augmentation(padding=2, flip=True, cutout=3)
    return make(images, batch_size, shuffle=True, augment=augment, drop_last=True, seed=7, **options)


def equal(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True)
    )


def test_evaluation_yields_every_image_once_in_order(images):
    batches = list(make(images))
    assert torch.cat([y for _, y in batches]).tolist() == list(range(COUNT))
    assert [len(y) for _, y in batches] == [8] * 6 + [5]
    pixels = (images.images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    assert torch.equal(torch.cat([x for x, _ in batches]), pixels)


def test_training_epochs_are_different_orders_without_repetition(images):
    loader = training(images)
    orders = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        orders.append(torch.cat([y for _, y in loader]).tolist())
    assert len(loader) == 6
    assert all(len(set(order)) == 48 for order in orders)
    assert orders[0] != orders[1]


def test_seed_epoch_and_stream_alone_decide(images):
    first = list(training(images))
    assert equal(first, list(training(images)))
    assert not equal(first, list(training(images, stream="search")))
    later = training(images)
    later.set_epoch(3)
    assert not equal(first, list(later))


def test_options_do_not_disturb_each_other(images):
    plain, flipped = (
        make(images, shuffle=True, augment=Augmentation(padding=2, flip=flip), seed=7) for flip in (False, True)
    )
    pairs = [pair for (x, _), (z, _) in zip(plain, flipped, strict=True) for pair in zip(x, z, strict=True)]
    same = [torch.equal(x, z) for x, z in pairs]
    assert all(torch.equal(x, z) or torch.equal(x, z.flip(2)) for x, z in pairs)
    assert any(same) and not all(same)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_are_the_global_batch_bit_for_bit(images, world_size):
    whole = training(images, 8)
    ranks = [training(images, 8 // world_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    for loader in (whole, *ranks):
        loader.set_epoch(2)
    together = [tuple(torch.cat(parts) for parts in zip(*shards, strict=True)) for shards in zip(*ranks, strict=True)]
    assert equal(list(whole), together)


@pytest.mark.parametrize("world_size", [2, 3, 4, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 10, 60])
def test_evaluation_shards_share_all_images_in_equally_many_batches(images, world_size, batch_size):
    shards = [list(make(images, batch_size, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert len({len(shard) for shard in shards}) == 1
    assert all(len(y) for shard in shards for _, y in shard)
    assert sorted(torch.cat([y for shard in shards for _, y in shard]).tolist()) == list(range(COUNT))


def test_mean_fill_pads_with_the_mean_colour(images):
    white = ImageSet(torch.full_like(images.images, 255), images.labels)
    batch, _ = next(iter(make(white, COUNT, augment=Augmentation(padding=3, fill="mean"), mean=(0.0, 0.2, 0.4))))
    minimum = batch.amin(dim=(0, 2, 3))
    assert torch.allclose(minimum, torch.zeros(3), atol=1e-6)


def test_larger_images_are_cropped_to_size(images):
    (centre, _), *_ = make(images, COUNT, size=6)
    assert torch.equal(centre, next(iter(make(images, COUNT)))[0][:, :, 1:7, 1:7])
    (crop, _), *_ = make(images, COUNT, size=6, augment=Augmentation())
    assert crop.shape == (COUNT, 3, 6, 6)
    assert not torch.equal(crop, centre)


@pytest.mark.parametrize("done", [0, 1, 5, 6])
def test_a_loaded_state_continues_within_the_epoch(images, done):
    reference = training(images)
    reference.set_epoch(4)
    iterator = iter(reference)
    for _ in range(done):
        next(iterator)
    state = reference.state_dict()
    resumed = training(images)
    resumed.load_state_dict(state)
    resumed.set_epoch(4)
    assert state == {"epoch": 4, "batches": done}
    assert resumed.state_dict() == state
    assert equal(list(iterator), list(resumed))
    assert len(list(resumed)) == 6, "the position holds for one iteration only"


def test_another_epoch_starts_at_its_beginning(images):
    loader = training(images)
    loader.load_state_dict({"epoch": 1, "batches": 3})
    loader.set_epoch(2)
    assert loader.state_dict() == {"epoch": 2, "batches": 0}
    assert len(list(loader)) == 6


def test_errors_name_the_config_key(images):
    with pytest.raises(ValueError, match=r"data\.batch_size=64: no full batch in 53 images; use 53 or less"):
        training(images, 64)
    with pytest.raises(ValueError, match=r"data\.mean=.*use 3 values"):
        make(images, mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match=r"data\.batch_size=8: the checkpoint stands at batch 9"):
        training(images).load_state_dict({"epoch": 0, "batches": 9})
