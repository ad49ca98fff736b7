"""Float checkpoints: renaming, strictness, clear errors, and the published numbers of correct test images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from research.models import FloatModel, load_float_checkpoint, resnet8, resnet20, resnet56

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BSQ = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


def trained(seed: int, **options: object) -> FloatModel:
    """A network whose norms have moved, so that every tensor matters."""
    torch.manual_seed(seed)
    model = resnet8(**options)
    model.train()(torch.randn(4, 3, 16, 16))
    return model


@pytest.fixture
def state() -> dict[str, Tensor]:
    return trained(0).state_dict()


def test_round_trip_is_exact(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / "float.safetensors")
    model = trained(1)
    load_float_checkpoint(model, str(tmp_path / "float.safetensors"))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_old_names_and_missing_counters(tmp_path: Path, state: dict[str, Tensor]) -> None:
    old = {
        "module." + name.replace("fc.", "linear."): tensor
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked")
    }
    save_file(old, tmp_path / "old.safetensors")
    model = trained(1)
    load_float_checkpoint(model, tmp_path / "old.safetensors")
    for name, tensor in model.state_dict().items():
        counter = name.endswith("num_batches_tracked")
        assert torch.equal(tensor, torch.zeros_like(tensor) if counter else state[name])


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"width": 8}, r"conv1\.weight has shape \(16, 3, 3, 3\), the model expects \(8, 3, 3, 3\)"),
        ({"num_classes": 100}, r"fc\.weight has shape \(10, 64\), the model expects \(100, 64\)"),
        ({"shortcut": "B"}, r"it has no tensor layer2\.0\.downsample\.0\.weight"),
    ],
)
def test_other_architecture(
    tmp_path: Path, state: dict[str, Tensor], options: dict[str, object], difference: str
) -> None:
    path = tmp_path / "float.safetensors"
    save_file(state, path)
    model = trained(1, **options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"^init_from=.*: {difference}; use .*$") as error:
        load_float_checkpoint(model, path)
    assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_unexpected_tensor(tmp_path: Path) -> None:
    save_file(trained(0, shortcut="B").state_dict(), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"the model has no tensor layer2\.0\.downsample\.0\.weight; use"):
        load_float_checkpoint(trained(1), tmp_path / "b.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_truncated_file(tmp_path: Path, state: dict[str, Tensor], kept: float) -> None:
    path = tmp_path / "cut.safetensors"
    save_file(state, path)
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(ValueError, match=r"^init_from=.*cut\.safetensors: truncated or corrupt") as error:
        load_float_checkpoint(trained(1), path)
    assert "\n" not in str(error.value)


def test_corrupt_header(tmp_path: Path) -> None:
    path = tmp_path / "noise.safetensors"
    path.write_bytes(bytes(range(256)) * 8)
    with pytest.raises(ValueError, match="truncated or corrupt"):
        load_float_checkpoint(trained(1), path)


def test_other_formats_and_missing_files(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "float.pt")
    with pytest.raises(ValueError, match=r"^init_from=.*float\.pt: .*use a \.safetensors file$"):
        load_float_checkpoint(trained(1), tmp_path / "float.pt")
    with pytest.raises(ValueError, match=r"^init_from=.*: no such file"):
        load_float_checkpoint(trained(1), tmp_path / "absent.safetensors")


@pytest.mark.slow
@pytest.mark.needs_data
@pytest.mark.parametrize(
    ("file", "make", "options", "normalisation", "correct"),
    [
        ("resnet20_cifar10_optA", resnet20, {}, IMAGENET, 9173),
        ("resnet56_cifar10_optA", resnet56, {}, IMAGENET, 9339),
        ("resnet20_cifar10_optB_bsq", resnet20, {"shortcut": "B"}, BSQ, 9257),
    ],
)
def test_published_checkpoints(
    cifar10_npz: Path,
    checkpoints_dir: Path,
    file: str,
    make: type,
    options: dict[str, str],
    normalisation: tuple[tuple[float, ...], tuple[float, ...]],
    correct: int,
) -> None:
    model = make(**options).eval()
    load_float_checkpoint(model, checkpoints_dir / f"{file}.safetensors")
    model.to(memory_format=torch.channels_last)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in normalisation)
    with np.load(cifar10_npz, allow_pickle=False) as arrays:
        images, labels = torch.from_numpy(arrays["test_images"]), torch.from_numpy(arrays["test_labels"]).long()
    found = 0
    with torch.inference_mode():
        for x, y in zip(images.split(500), labels.split(500), strict=True):
            x = (x.permute(0, 3, 1, 2).float() / 255 - mean) / std
            found += int((model(x).argmax(1) == y).sum())
    assert len(labels) == 10_000
    assert found == correct
