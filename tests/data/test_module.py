from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from research.data import ImageDataModule

CONF = Path(__file__).resolve().parents[2] / "conf"
NAMES = sorted(path.stem for path in (CONF / "data").glob("*.yaml"))


def make(**options):
    defaults = {
        "name": "synthetic",
        "root": "nowhere",
        "batch_size": 16,
        "eval_batch_size": 32,
        "mean": (0.5,),
        "std": (0.25,),
        "num_classes": 4,
        "in_channels": 1,
        "image_size": 8,
        "options": {"train": 200, "test": 60},
    }
    return ImageDataModule(**(defaults | options))


def place(module, rank, world_size):
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    module.trainer = SimpleNamespace(strategy=strategy, global_rank=rank, world_size=world_size)
    return module


def images_of(loader):
    return {image.numpy().tobytes() for x, _ in loader for image in x}


def test_parts_are_disjoint_stratified_and_independent_of_each_other():
    module = make(validation=40, search=20, batch_size=20)
    module.setup()
    parts = module._parts
    pixels = {part: {image.numpy().tobytes() for image in images.images} for part, images in parts.items()}
    assert {part: len(found) for part, found in pixels.items()} == {
        "train": 140,
        "validation": 40,
        "search": 20,
        "test": 60,
    }
    assert len(set.union(*pixels.values())) == 260
    assert torch.bincount(parts["validation"].labels).tolist() == [10] * 4
    assert torch.bincount(parts["search"].labels).tolist() == [5] * 4
    alone = make(validation=40)
    alone.setup()
    assert torch.equal(alone._parts["validation"].images, parts["validation"].images)
    other = make(validation=40, split_seed=1)
    other.setup()
    assert not torch.equal(other._parts["validation"].images, parts["validation"].images)


def test_loaders_have_the_batches_of_the_options():
    module = make(validation=40, search=20, padding=2, flip=True)
    assert [len(y) for _, y in module.train_dataloader()] == [16] * 8
    assert [len(y) for _, y in module.val_dataloader()] == [32, 8]
    assert [len(y) for _, y in module.test_dataloader()] == [32, 28]
    assert [len(y) for _, y in module.search_dataloader()] == [16]
    x, y = next(iter(module.train_dataloader()))
    assert (x.shape, x.dtype, y.dtype) == ((16, 1, 8, 8), torch.float32, torch.int64)


def test_nothing_held_out_gives_no_validation_loader():
    module = make()
    assert module.val_dataloader() == []
    assert sum(len(y) for _, y in module.train_dataloader()) == 192
    with pytest.raises(ValueError, match=r"data\.search=0"):
        module.search_dataloader()


def test_limit_train_keeps_a_stratified_few():
    module = make(limit_train=32, validation=40)
    module.setup()
    assert torch.bincount(module._parts["train"].labels).tolist() == [8] * 4


def test_calibration_batches_are_fixed_plain_training_images_on_all_ranks():
    module = make(padding=2, flip=True, validation=40)
    batches = module.calibration_batches(3, 10)
    assert [x.shape for x, _ in batches] == [(10, 1, 8, 8)] * 3
    assert images_of(batches) <= images_of(make(validation=40, batch_size=1).train_dataloader())
    second_rank = place(make(validation=40), 1, 2).calibration_batches(3, 10)
    assert all(torch.equal(x, z) for (x, _), (z, _) in zip(batches, second_rank, strict=True))
    assert not torch.equal(make(validation=40, seed=1).calibration_batches(1, 10)[0][0], batches[0][0])
    for count in (0, 17):
        with pytest.raises(ValueError, match="the training part has 160"):
            module.calibration_batches(count, 10)


def test_ranks_share_the_global_batch():
    one = make(padding=2, flip=True, validation=40)
    two = [place(make(padding=2, flip=True, validation=40), rank, 2) for rank in range(2)]
    for (x, y), first, second in zip(one.train_dataloader(), *(m.train_dataloader() for m in two), strict=True):
        assert torch.equal(x, torch.cat([first[0], second[0]]))
        assert torch.equal(y, torch.cat([first[1], second[1]]))
    shards = [images_of(module.test_dataloader()) for module in two]
    assert [len(shard) for shard in shards] == [30, 30]
    assert set.union(*shards) == images_of(one.test_dataloader())
    with pytest.raises(ValueError, match=r"data\.batch_size=16: not a multiple of 3 processes; use 18"):
        place(make(), 0, 3).train_dataloader()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "mnist"}, r"data\.name=mnist: use one of embedded, "),
        ({"download": True}, r"data\.download=true: synthetic has no download"),
        ({"options": {"size": 3}}, r"data\.options\.size: unknown; synthetic takes train, test"),
        ({"name": "embedded"}, r"data\.options\.test: unknown; embedded takes no options"),
        ({"batch_size": 0}, r"data\.batch_size=0: use 1 or more"),
        ({"limit_train": 0}, r"data\.limit_train=0: use 1 or more"),
        ({"validation": 201}, r"data\.validation=201: 200 training images are left"),
        ({"validation": 150, "search": 51}, r"data\.search=51: 50 training images are left"),
        ({"limit_train": 201}, r"data\.limit_train=201: 200 training images are left"),
        ({"validation": -1}, r"data\.validation=-1"),
        ({"name": "embedded", "options": {}, "num_classes": 100}, r"data\.num_classes=100: embedded has 10; use"),
        ({"name": "embedded", "options": {}, "num_classes": 10}, r"data\.image_size=8: embedded has 28; use"),
        ({"name": "cifar10", "options": {}}, r"data=cifar10: no cifar-10-binary\.tar\.gz.*data\.download=true"),
    ],
)
def test_errors_name_the_config_key(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options).setup()


@pytest.mark.parametrize("name", NAMES)
def test_every_config_builds_a_module(name, tmp_path):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(overrides=[f"+data={name}", "+seed=3"])
    module = instantiate(config.data, root=str(tmp_path))
    assert isinstance(module, ImageDataModule)
    assert module.seed == 3
    if name in ("embedded", "synthetic"):
        x, _ = next(iter(module.train_dataloader()))
        side = config.data.image_size
        assert x.shape == (config.data.batch_size, config.data.in_channels, side, side)


def test_image_folder_module(tmp_path):
    from PIL import Image

    for part in ("train", "val"):
        for label in range(2):
            (tmp_path / part / str(label)).mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (20, 20), (90 * label, index, 0)).save(tmp_path / part / str(label) / f"{index}.png")
    options = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "in_channels": 3, "num_classes": 2, "batch_size": 4}
    module = make(
        name="image_folder",
        root=str(tmp_path.parent),
        options={"folder": tmp_path.name, "margin": 2},
        validation=2,
        **options,
    )
    assert [x.shape for x, _ in module.train_dataloader()] == [(4, 3, 8, 8)]
    assert [x.shape for x, _ in module.test_dataloader()] == [(8, 3, 8, 8)]


@pytest.mark.needs_data
def test_real_cifar10(cifar10_npz):
    options = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "in_channels": 3, "num_classes": 10, "image_size": 32}
    module = make(name="cifar10", root=str(cifar10_npz.parent), options={}, validation=5000, **options)
    module.setup()
    counts = {part: torch.bincount(images.labels).tolist() for part, images in module._parts.items() if len(images)}
    assert counts == {"train": [4500] * 10, "validation": [500] * 10, "test": [1000] * 10}
    assert module._parts["test"].labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
