"""Where the tests find what the repository does not ship: data sets, float checkpoints, further golden vectors.

Each folder comes from an environment variable (FLATBIT_DATA, FLATBIT_CHECKPOINTS, FLATBIT_GOLDEN) or else from a fixed
place; a test whose files are absent is skipped with the reason.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).resolve().parent
SHARED = TESTS.parent.parent / "shared"


def folder(variable: str, default: Path) -> Path:
    """Folder named by the environment variable `variable`, else `default`."""
    return Path(os.environ.get(variable) or default)


def load_golden(name: str) -> dict[str, np.ndarray]:
    """Arrays of the golden file `<name>.npz` by name; skips the test if there is no such file."""
    path = folder("FLATBIT_GOLDEN", TESTS / "golden") / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"no golden vectors {path.name}: set FLATBIT_GOLDEN to their folder")
    with np.load(path, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """The loader of golden vectors: `golden("lsq")` gives its arrays by name."""
    return load_golden


@pytest.fixture(scope="session")
def cifar10_npz() -> Path:
    """The file `cifar10.npz`: {train,test}_images (NHWC, uint8) and {train,test}_labels."""
    path = folder("FLATBIT_DATA", SHARED / "data") / "cifar10.npz"
    if not path.is_file():
        pytest.skip("no cifar10.npz: set FLATBIT_DATA to its folder")
    return path


@pytest.fixture(scope="session")
def checkpoints_dir() -> Path:
    """The folder of the float checkpoints (`resnet20_cifar10_optA.safetensors`, ...)."""
    path = folder("FLATBIT_CHECKPOINTS", SHARED / "checkpoints")
    if not path.is_dir():
        pytest.skip("no float checkpoints: set FLATBIT_CHECKPOINTS to their folder")
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest test, the README's commands: behind all others one worker waited minutes for it."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")
