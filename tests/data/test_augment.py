import pytest
import torch

from research.data import Augmentation, keyed_generator
from research.data.augment import centre_crop, crop_flip, cutout, draw, normalise, pad_images


@pytest.fixture
def images():
    return torch.randint(256, (7, 10, 12, 3), generator=keyed_generator(0), dtype=torch.uint8)


@pytest.mark.parametrize("flip", [True, False])
def test_crop_flip_equals_a_loop_over_samples(images, flip):
    rows = torch.tensor([3, 3, 0, 6, 5, 1, 2, 4] * 4)
    draws = draw(len(rows), (10 - 8 + 1, 12 - 8 + 1), 8, keyed_generator(1))
    batch = crop_flip(images, rows, draws, 8, flip)
    for index, row in enumerate(rows.tolist()):
        top, left, mirrored = draws[index, :3].tolist()
        expected = images[row, top : top + 8, left : left + 8]
        assert torch.equal(batch[index], expected.flip(1) if flip and mirrored else expected)


def test_draws_cover_their_ranges():
    draws = draw(2000, (3, 5), 8, keyed_generator(2))
    assert draws.amin(dim=0).tolist() == [0, 0, 0, 0, 0]
    assert draws.amax(dim=0).tolist() == [2, 4, 1, 7, 7]
    assert draws[:, 2].float().mean() == pytest.approx(0.5, abs=0.05)


def test_padding_surrounds_the_images_with_its_value(images):
    padded = pad_images(images, 2, (1, 2, 3))
    assert padded.shape == (7, 14, 16, 3)
    assert torch.equal(padded[:, 2:-2, 2:-2], images)
    border = torch.ones(14, 16, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    assert (padded[:, border] == torch.tensor([1, 2, 3], dtype=torch.uint8)).all()


def test_centre_crop_takes_the_middle(images):
    rows = torch.tensor([4, 1])
    assert torch.equal(centre_crop(images, rows, 8), images[rows, 1:9, 2:10])


def test_normalise_equals_the_formula_in_channels_last(images):
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6])
    batch = normalise(images, mean, std)
    expected = (images.permute(0, 3, 1, 2) / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert batch.dtype == torch.float32
    assert torch.equal(batch, expected)
    assert batch.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [1, 4, 5])
def test_cutout_equals_a_loop_over_samples(size):
    batch = torch.ones(40, 2, 8, 8)
    draws = draw(40, (1, 1), 8, keyed_generator(3))
    erased = cutout(batch, draws, size)
    for index in range(40):
        row, column = draws[index, 3:].tolist()
        expected = torch.ones(2, 8, 8)
        top, left = row - size // 2, column - size // 2
        expected[:, max(top, 0) : top + size, max(left, 0) : left + size] = 0
        assert torch.equal(erased[index], expected)


@pytest.mark.parametrize(
    ("options", "key"),
    [({"padding": -1}, "data.padding"), ({"cutout": -2}, "data.cutout"), ({"fill": "x"}, "data.fill")],
)
def test_bad_options_name_the_config_key(options, key):
    with pytest.raises(ValueError, match=key):
        Augmentation(**options)
