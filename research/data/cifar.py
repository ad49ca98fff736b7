"""CIFAR-10 and CIFAR-100 from the official binary archive, its extracted files, or the `.npz` form.

Archives and formats: Krizhevsky, https://www.cs.toronto.edu/~kriz/cifar.html, section "Binary version". The pickled
"python version" is not read.
"""

from __future__ import annotations

import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from research.data.download import download, verify_checksum
from research.data.images import ImageSet, ImageSplits
from research.data.npz import check_labels, load_npz

SIDE = 32
PIXEL_BYTES = 3 * SIDE * SIDE


@dataclass(frozen=True)
class CifarRelease:
    """One official release: a record is `label_bytes` labels, the last of them the class, and 3 x 32 x 32 pixels."""

    name: str
    url: str
    md5: str
    folder: str
    train_files: tuple[str, ...]
    test_file: str
    records_per_train_file: int
    test_records: int
    label_bytes: int
    num_classes: int

    @property
    def archive(self) -> str:
        """File name of the archive."""
        return self.url.rsplit("/", 1)[1]


CIFAR10 = CifarRelease(
    name="cifar10",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    md5="c32a1d4ab5d03f1284b67883e8d87530",
    folder="cifar-10-batches-bin",
    train_files=tuple(f"data_batch_{index}.bin" for index in range(1, 6)),
    test_file="test_batch.bin",
    records_per_train_file=10_000,
    test_records=10_000,
    label_bytes=1,
    num_classes=10,
)
CIFAR100 = CifarRelease(
    name="cifar100",
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    md5="03b5dce01913d631647c71ecec9e9cb8",
    folder="cifar-100-binary",
    train_files=("train.bin",),
    test_file="test.bin",
    records_per_train_file=50_000,
    test_records=10_000,
    label_bytes=2,
    num_classes=100,
)


def download_cifar(release: CifarRelease, root: Path) -> None:
    """Fetch the official archive into `root`, unless the set is there in one of its forms."""
    if _find(release, root) is None:
        download(release.url, root / release.archive, release.md5)


def load_cifar(release: CifarRelease, root: Path) -> ImageSplits:
    """Read `release` from `root`: the archive (checksum verified), else the extracted folder, else `<name>.npz`."""
    path = _find(release, root)
    if path is None:
        raise ValueError(
            f"data={release.name}: no {release.archive}, {release.folder}/ or {release.name}.npz in {root}; "
            f"add data.download=true, or name their folder by paths.data=DIR or FLATBIT_DATA=DIR"
        )
    remedy = "delete it and add data.download=true"
    if path.suffix == ".npz":
        return load_npz(path, release.num_classes, remedy)
    if path.is_dir():
        files = {name: _read_file(path / name, remedy) for name in (*release.train_files, release.test_file)}
    else:
        verify_checksum(path, "md5", release.md5, remedy)
        files = _read_archive(release, path, remedy)
    train = _decode(release, [files[name] for name in release.train_files], release.records_per_train_file, path)
    test = _decode(release, [files[release.test_file]], release.test_records, path)
    return ImageSplits(train, test, release.num_classes, image_size=SIDE)


def _find(release: CifarRelease, root: Path) -> Path | None:
    candidates = (root / release.archive, root / release.folder, root / f"{release.name}.npz")
    return next((path for path in candidates if path.exists()), None)


def _read_file(path: Path, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: not readable ({error.strerror}); {remedy}") from error


def _read_archive(release: CifarRelease, path: Path, remedy: str) -> dict[str, bytes]:
    wanted = {f"{release.folder}/{name}": name for name in (*release.train_files, release.test_file)}
    files = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.name in wanted else None
                if content is not None:
                    files[wanted[member.name]] = content.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: corrupt archive ({error}); {remedy}") from error
    if missing := sorted(set(wanted.values()) - set(files)):
        raise ValueError(f"{path}: no {missing[0]} inside; {remedy}")
    return files


def _decode(release: CifarRelease, contents: list[bytes], records: int, path: Path) -> ImageSet:
    """Turn files of planar records into NHWC images and the labels of the last label byte."""
    width = release.label_bytes + PIXEL_BYTES
    for content in contents:
        if len(content) != records * width:
            raise ValueError(
                f"{path}: a file of {len(content)} bytes, not {records} records of {width} bytes; "
                "delete it and add data.download=true"
            )
    table = np.concatenate([np.frombuffer(content, dtype=np.uint8) for content in contents]).reshape(-1, width)
    labels = torch.from_numpy(table[:, release.label_bytes - 1].astype(np.int64))
    planes = table[:, release.label_bytes :].reshape(-1, 3, SIDE, SIDE)
    images = ImageSet(torch.from_numpy(np.ascontiguousarray(planes.transpose(0, 2, 3, 1))), labels)
    check_labels(images, release.num_classes, path)
    return images
