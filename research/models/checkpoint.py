"""Float checkpoints: safetensors files to start quantization-aware training from."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

COUNTER = "num_batches_tracked"


def canonical_name(name: str) -> str:
    """Name of a tensor in this room's networks: without a leading `module.`, the classifier `linear` called `fc`."""
    name = name.removeprefix("module.")
    return f"fc.{name.removeprefix('linear.')}" if name.startswith("linear.") else name


def first_difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """First name or shape in which `found` differs from `expected`, in words; None where a model can take it all."""
    for name, tensor in expected.items():
        if name not in found:
            return f"it has no tensor {name}"
        if found[name].shape != tensor.shape:
            return f"{name} has shape {tuple(found[name].shape)}, the model expects {tuple(tensor.shape)}"
    for name in sorted(found):
        if name not in expected:
            return f"the model has no tensor {name}"
    return None


def load_float_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load the float weights in the safetensors file `path` into `model`, every tensor or none.

    Older files lack the batch-norm counters `num_batches_tracked`: those become zero. Any other difference is an error.

    Raises:
        ValueError: another format, no such file, a truncated or corrupt file, or another architecture.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"init_from={path}: pickled weights can run code and are not read; use a .safetensors file")
    if not path.is_file():
        raise ValueError(f"init_from={path}: no such file; use the path of a .safetensors file")
    try:
        found = {canonical_name(name): tensor for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"init_from={path}: truncated or corrupt ({error}); use an intact copy of the file") from error
    expected = model.state_dict()
    if any("quantizer." in name for name in found):
        raise ValueError(f"init_from={path}: weights of a quantized network; use those of a float run")
    for name, tensor in expected.items():
        if name.endswith(COUNTER) and name not in found:
            found[name] = torch.zeros_like(tensor)
    difference = first_difference(expected, found)
    if difference is not None:
        raise ValueError(
            f"init_from={path}: {difference}; use the model, shortcut and num_classes that it was trained with"
        )
    model.load_state_dict(found)
