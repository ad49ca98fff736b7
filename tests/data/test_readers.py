import dataclasses
import gzip
import hashlib
import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from research.data import fashion_mnist
from research.data.cifar import CIFAR10, CIFAR100, download_cifar, load_cifar
from research.data.download import download
from research.data.embedded import EMBEDDED_FILE, SHA256, load_embedded
from research.data.image_folder import load_image_folder
from research.data.make_embedded import make_embedded
from research.data.npz import load_npz
from research.data.synthetic import load_synthetic

RANDOM = np.random.default_rng(0)
SAFELY = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4


@pytest.fixture(params=[CIFAR10, CIFAR100], ids=lambda release: release.name)
def release(request):
    """An official release with 6 images in each file."""
    return dataclasses.replace(request.param, records_per_train_file=6, test_records=6)


@pytest.fixture
def cifar(release, tmp_path):
    """(release with the archive's checksum, root folder, images NHWC and labels of the first training file)."""
    files, images, labels = {}, None, None
    for name in (*release.train_files, release.test_file):
        planes = RANDOM.integers(256, size=(6, 3, 32, 32), dtype=np.uint8)
        numbers = RANDOM.integers(release.num_classes, size=6, dtype=np.uint8)
        coarse = [np.full((6, 1), 3, dtype=np.uint8)] * (release.label_bytes - 1)
        files[name] = np.hstack([*coarse, numbers[:, None], planes.reshape(6, -1)]).tobytes()
        if images is None:
            images, labels = planes.transpose(0, 2, 3, 1), numbers
    with tarfile.open(tmp_path / release.archive, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{release.folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    digest = hashlib.md5((tmp_path / release.archive).read_bytes()).hexdigest()
    return dataclasses.replace(release, md5=digest), tmp_path, images, labels


def test_cifar_archive_and_extracted_files_hold_the_same(cifar):
    release, root, images, labels = cifar
    from_archive = load_cifar(release, root)
    assert np.array_equal(from_archive.train.images[:6], images)
    assert np.array_equal(from_archive.train.labels[:6], labels)
    assert len(from_archive.train) == 6 * len(release.train_files) and len(from_archive.test) == 6
    with tarfile.open(root / release.archive) as archive:
        archive.extractall(root, **SAFELY)
    (root / release.archive).unlink()
    from_folder = load_cifar(release, root)
    for part in ("train", "test"):
        assert torch.equal(getattr(from_archive, part).images, getattr(from_folder, part).images)
        assert torch.equal(getattr(from_archive, part).labels, getattr(from_folder, part).labels)


def test_cifar_errors_name_the_file_and_the_remedy(cifar):
    release, root, *_ = cifar
    archive = root / release.archive
    content = archive.read_bytes()
    with pytest.raises(ValueError, match=f"{release.archive}: md5 is .* not {CIFAR10.md5}"):
        load_cifar(dataclasses.replace(release, md5=CIFAR10.md5), root)
    archive.write_bytes(content[: len(content) // 2])
    truncated = dataclasses.replace(release, md5=hashlib.md5(archive.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match=f"{release.archive}: corrupt archive"):
        load_cifar(truncated, root)
    archive.write_bytes(content)
    with pytest.raises(ValueError, match="no absent.bin inside"):
        load_cifar(dataclasses.replace(release, test_file="absent.bin"), root)
    with pytest.raises(ValueError, match="not 7 records"):
        load_cifar(dataclasses.replace(release, test_records=7), root)
    with pytest.raises(ValueError, match="of 2 classes"):
        load_cifar(dataclasses.replace(release, num_classes=2), root)
    archive.unlink()
    with pytest.raises(ValueError, match=r"data.download=true.*paths.data=DIR or FLATBIT_DATA=DIR"):
        load_cifar(release, root)
    (root / release.folder).mkdir()
    with pytest.raises(ValueError, match=f"{release.train_files[0]}: not readable"):
        load_cifar(release, root)


def test_download_verifies_before_the_file_takes_its_name(cifar):
    release, root, *_ = cifar
    source = dataclasses.replace(release, url=(root / release.archive).as_uri())
    target = root / "new"
    with pytest.raises(ValueError, match=f"not {CIFAR10.md5}"):
        download_cifar(dataclasses.replace(source, md5=CIFAR10.md5), target)
    assert list(target.iterdir()) == []
    download_cifar(source, target)
    assert [path.name for path in target.iterdir()] == [release.archive]
    assert len(load_cifar(source, target).test) == 6
    download_cifar(dataclasses.replace(source, url=f"file:///nowhere/{release.archive}"), target)


def test_failed_download_says_what_to_do_by_hand(tmp_path):
    with pytest.raises(ValueError, match="data.download=true: could not fetch file:///nowhere/a.gz.*by hand"):
        download("file:///nowhere/a.gz", tmp_path / "a.gz", "0")
    assert list(tmp_path.iterdir()) == []


def write_npz(path, **changes):
    arrays = {
        "train_images": RANDOM.integers(256, size=(9, 32, 32, 3), dtype=np.uint8),
        "train_labels": np.arange(9, dtype=np.uint8),
        "test_images": RANDOM.integers(256, size=(4, 32, 32, 3), dtype=np.uint8),
        "test_labels": np.arange(4, dtype=np.int32),
    } | changes
    np.savez_compressed(path, **{name: array for name, array in arrays.items() if array is not None})
    return arrays


def test_npz_form_of_cifar(tmp_path):
    arrays = write_npz(tmp_path / "cifar10.npz")
    splits = load_cifar(CIFAR10, tmp_path)
    assert np.array_equal(splits.train.images, arrays["train_images"])
    assert splits.test.labels.tolist() == [0, 1, 2, 3]
    assert (splits.num_classes, splits.image_size) == (10, 32)


@pytest.mark.parametrize(
    "changes",
    [
        {"test_labels": None},
        {"train_labels": np.arange(8)},
        {"train_images": np.zeros((9, 32, 32, 3), dtype=np.float32)},
        {"train_labels": np.full(9, 10)},
        {"train_labels": np.array([object()] * 9)},
    ],
    ids=["key", "length", "dtype", "class", "pickle"],
)
def test_npz_errors_name_the_file(tmp_path, changes):
    path = tmp_path / "set.npz"
    write_npz(path, **changes)
    with pytest.raises(ValueError, match=r"set\.npz: ") as error:
        load_npz(path, 10, "make it again")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text"])
def test_corrupt_npz_is_one_line(tmp_path, damage):
    path = tmp_path / "set.npz"
    write_npz(path)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    path.write_bytes({"truncated": content[:5000], "flipped": content, "text": b"hello"}[damage])
    with pytest.raises(ValueError, match=r"set\.npz: corrupt.*make it again$") as error:
        load_npz(path, 10, "make it again")
    assert "\n" not in str(error.value)


def write_idx(path, array):
    header = np.array([0x0800 + array.ndim, *array.shape], dtype=">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """A Fashion-MNIST of 12 + 5 images."""
    monkeypatch.setattr(fashion_mnist, "PREFIXES", {"train": ("train", 12), "test": ("t10k", 5)})
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "absent")
    arrays = {}
    for prefix, count in (("train", 12), ("t10k", 5)):
        arrays[prefix] = RANDOM.integers(256, size=(count, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", arrays[prefix])
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 10)
    return tmp_path, arrays


def test_fashion_mnist_reads_idx_files(fashion):
    root, arrays = fashion
    splits = fashion_mnist.load_fashion_mnist(root)
    assert np.array_equal(splits.train.images[..., 0], arrays["train"])
    assert np.array_equal(splits.test.images[..., 0], arrays["t10k"])
    assert splits.train.labels.tolist() == [*range(10), 0, 1]


def test_fashion_mnist_errors_name_the_file(fashion):
    root, arrays = fashion
    path = root / "train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    write_idx(path, arrays["train"][:11])
    with pytest.raises(ValueError, match="train-images.*not an IDX file of 12x28x28 bytes"):
        fashion_mnist.load_fashion_mnist(root)
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match="train-images.*not readable as gzip"):
        fashion_mnist.load_fashion_mnist(root)
    path.unlink()
    with pytest.raises(ValueError, match="apt-get install dataset-fashion-mnist.*paths.data=DIR"):
        fashion_mnist.load_fashion_mnist(root)


def test_embedded_set_is_small_balanced_and_verified(tmp_path):
    assert EMBEDDED_FILE.stat().st_size <= 7_000_000
    assert hashlib.sha256(EMBEDDED_FILE.read_bytes()).hexdigest() == SHA256
    splits = load_embedded()
    assert splits.train.images.shape == (10_000, 28, 28, 1)
    assert torch.bincount(splits.train.labels).tolist() == [1000] * 10
    assert torch.bincount(splits.test.labels).tolist() == [200] * 10
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(EMBEDDED_FILE.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"damaged\.npz: sha256 is"):
        load_embedded(damaged)
    with pytest.raises(ValueError, match=r"absent\.npz: missing"):
        load_embedded(tmp_path / "absent.npz")


@pytest.mark.needs_data
def test_embedded_set_is_made_again_with_the_same_images(tmp_path):
    """Array by array: how an archive is compressed differs from one zlib to the next."""
    if not fashion_mnist.DEBIAN_FOLDER.is_dir():
        pytest.skip("no Debian package dataset-fashion-mnist")
    digest = make_embedded(fashion_mnist.DEBIAN_FOLDER, tmp_path / "again.npz")
    assert digest == hashlib.sha256((tmp_path / "again.npz").read_bytes()).hexdigest()
    with np.load(tmp_path / "again.npz") as again, np.load(EMBEDDED_FILE) as embedded:
        assert again.files == embedded.files
        assert all(np.array_equal(again[name], embedded[name]) for name in embedded.files)


@pytest.fixture
def folder(tmp_path):
    """An image folder of two classes, wide and tall images of one colour each."""
    for part, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("ant", "bee")):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                size = (40, 20) if index % 2 else (15, 30)
                image = Image.new("RGB", size, (100 * label, 10 * index, 50))
                image.save(tmp_path / part / name / f"{index}.{'png' if index else 'JPEG'}")
    return tmp_path


def test_image_folder_decodes_once_into_squares(folder):
    splits = load_image_folder(folder, 8, margin=4)
    assert splits.train.images.shape == (6, 12, 12, 3)
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert splits.test.labels.tolist() == [0, 0, 1, 1]
    assert (splits.num_classes, splits.image_size) == (2, 8)
    assert splits.train.images[4].unique(dim=0).shape[0] == 1
    assert splits.train.images[4, 0, 0].tolist() == [100, 10, 50]
    cached = {path.name: path.stat().st_mtime_ns for path in (folder / "decoded").iterdir()}
    assert len(cached) == 2
    again = load_image_folder(folder, 8, margin=4)
    assert torch.equal(again.train.images, splits.train.images)
    assert cached == {path.name: path.stat().st_mtime_ns for path in (folder / "decoded").iterdir()}


def test_image_folder_keeps_the_centre_of_a_wide_image(folder):
    stripes = np.zeros((10, 30, 3), dtype=np.uint8)
    stripes[:, 10:20] = 255
    Image.fromarray(stripes).save(folder / "train" / "ant" / "1.png")
    assert load_image_folder(folder, 10, margin=0).train.images[1].min() == 255


def test_image_folder_uses_another_cache_and_notices_changes(folder, tmp_path):
    cache = tmp_path / "cache"
    load_image_folder(folder, 8, cache=str(cache))
    Image.new("RGB", (9, 9), (1, 2, 3)).save(folder / "train" / "bee" / "9.png")
    assert len(load_image_folder(folder, 8, cache=str(cache)).train) == 7
    assert len(list(cache.iterdir())) == 3
    next(cache.glob("val_*")).write_bytes(b"x")
    with pytest.raises(ValueError, match="corrupt cache .*delete it"):
        load_image_folder(folder, 8, cache=str(cache))


def test_image_folder_errors_name_the_key_or_the_file(folder):
    with pytest.raises(ValueError, match=r"data\.options\.memory_limit_gib=0\.0001: .* take 0\.0 GiB at 256x256"):
        load_image_folder(folder, 224, memory_limit_gib=0.0001)
    with pytest.raises(ValueError, match=r"no folder .*absent.*give paths\.data=DIR"):
        load_image_folder(folder / "absent", 8)
    with pytest.raises(ValueError, match=r"not writable .*data\.options\.cache=DIR"):
        load_image_folder(folder, 8, cache=str(folder / "train" / "ant" / "1.png"))
    (folder / "val" / "cat").mkdir()
    with pytest.raises(ValueError, match="cat: a class without a folder"):
        load_image_folder(folder, 8)
    (folder / "val" / "cat").rmdir()
    (folder / "train" / "bee" / "2.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"bee/2\.png: not readable as an image"):
        load_image_folder(folder, 8)
    assert not list((folder / "decoded").iterdir())


def test_empty_image_folder(tmp_path):
    for part in ("train", "val"):
        (tmp_path / part / "ant").mkdir(parents=True)
    with pytest.raises(ValueError, match="train: no images"):
        load_image_folder(tmp_path, 8)


def test_synthetic_set_is_fixed_balanced_and_learnable():
    splits = load_synthetic(train=100, test=50, num_classes=5, in_channels=1, image_size=9)
    assert torch.equal(
        splits.train.images, load_synthetic(train=100, num_classes=5, in_channels=1, image_size=9).train.images
    )
    assert torch.bincount(splits.train.labels).tolist() == [20] * 5
    assert splits.train.images.shape == (100, 9, 9, 1)
    means = torch.stack([splits.train.images[splits.train.labels == label].float().mean(0) for label in range(5)])
    nearest = torch.cdist(splits.test.images.float().flatten(1), means.flatten(1)).argmin(dim=1)
    assert torch.equal(nearest, splits.test.labels)
    assert not torch.equal(
        splits.train.images, load_synthetic(train=100, num_classes=5, in_channels=1, image_size=9, seed=1).train.images
    )


@pytest.mark.parametrize(
    ("options", "key"), [({"train": 3}, "train=3"), ({"test": 9}, "test=9"), ({"noise": 256}, "noise=256")]
)
def test_synthetic_errors_name_the_key(options, key):
    with pytest.raises(ValueError, match=f"data.options.{key}"):
        load_synthetic(**options)
