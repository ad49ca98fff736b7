"""The artifact: a folder from which alone a deployed network is rebuilt, bit for bit.

``model.safetensors`` holds the numbers, ``model.json`` says what they mean:

=============================  ====================================================================================
tensor                         what it is
=============================  ====================================================================================
``<layer>.weight.codes``       uint8, codes as `research.deploy.packing` packs them
``<layer>.weight.scale``       float32, the grid's scale (or codebook), broadcasts against the weight
``<layer>.weight.zero_point``  float32, only where the grid has one
others                         under their names in the network: biases, batch-norm, scales of inputs and outputs
=============================  ====================================================================================

``model.json``: ``schema``; ``model`` (``_target_`` and arguments of the float network); ``replace`` (module
exchanges of the recipe); ``table`` and ``outputs`` (the quantizers' specifications); ``scales`` (layers with an
`OutputScale`); ``identities`` (modules that folding emptied); ``weights`` (grid, bits, shape, and ``qmin``, ``step``,
``width`` of the packed codes, by layer); ``quantizers`` (bits and sign of the others); ``meta`` (free); ``sha256``
over both files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensor_bytes
from torch import nn

from research.deploy.deployed import deployed
from research.deploy.description import describe, rebuild, tensors_of
from research.quant.quantizers import Quantizer
from research.runs.files import atomic_write_bytes, atomic_write_text

SCHEMA = 1
TENSORS, DOCUMENT = "model.safetensors", "model.json"
KEYS = {
    "schema", "model", "replace", "table", "outputs", "scales", "identities", "weights", "quantizers", "meta", "sha256",
}  # fmt: skip


@dataclass(frozen=True)
class ArtifactReport:
    """Sizes of an artifact, in bytes.

    Attributes:
        folder: where it is.
        bytes: both files.
        code_bytes: packed weight codes alone.
        float_bytes: float32 tensors of the same network without quantization (batch-norm counters left out).
    """

    folder: Path
    bytes: int
    code_bytes: int
    float_bytes: int

    @property
    def compression(self) -> float:
        """How many times smaller than the float network."""
        return self.float_bytes / self.bytes


def save_artifact(
    net: nn.Module,
    model: Mapping[str, Any],
    folder: Path | str,
    replace: Sequence[Mapping[str, Any]] = (),
    meta: Mapping[str, Any] | None = None,
) -> ArtifactReport:
    """Write a finalised network as integers. It is read back and compared before a file is written.

    Args:
        net: a finalised, converted network; it stays as it is.
        model: plain config of the float network, ``{_target_: ..., **arguments}``.
        folder: where ``model.safetensors`` and ``model.json`` go; made where missing, files in it are replaced.
        replace: ``quantizer.replace`` of the recipe, the one part that a converted network does not show.
        meta: plain containers to keep with it, such as the run's hash and accuracy.

    Raises:
        ValueError: a network that its codes or this description do not give back, or a folder that cannot be written.
    """
    folder = Path(folder)
    net = deployed(net)
    document = {"schema": SCHEMA, **describe(net, model, replace), "meta": dict(meta or {})}
    tensors = tensors_of(net, document)
    _prove(net, rebuild(document, tensors), folder)
    data = tensor_bytes(tensors)
    document["sha256"] = _digest(document, data)
    text = json.dumps(document, separators=(",", ":")) + "\n"
    atomic_write_bytes(folder / TENSORS, data)
    atomic_write_text(folder / DOCUMENT, text)
    return ArtifactReport(
        folder=folder,
        bytes=len(data) + len(text.encode()),
        code_bytes=sum(tensors[f"{name}.weight.codes"].numel() for name in document["weights"]),
        float_bytes=_float_bytes(net),
    )


def load_artifact(folder: Path | str) -> nn.Module:
    """The deployed network of an artifact, in evaluation mode on the CPU; nothing else is read.

    Raises:
        ValueError: no artifact, a truncated or corrupt one, one of another schema, or one that names a class outside
            the allow-list of `research.targets`.
    """
    folder = Path(folder)
    document = _read_document(folder)
    try:
        data = (folder / TENSORS).read_bytes()
    except OSError as error:
        raise ValueError(
            f"artifact={folder}: no {TENSORS} ({error.strerror}); use a folder that export wrote"
        ) from None
    if _digest(document, data) != document["sha256"]:
        raise ValueError(f"artifact={folder}: {TENSORS} or {DOCUMENT} is truncated or corrupt; export the run again")
    try:
        return rebuild(document, read_tensors(data))
    except ValueError as error:
        raise ValueError(f"artifact={folder}: {error}") from error
    except (SafetensorError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"artifact={folder}: {DOCUMENT} does not describe {TENSORS} ({type(error).__name__} {error})"
        ) from error


def _read_document(folder: Path) -> dict[str, Any]:
    try:
        document = json.loads((folder / DOCUMENT).read_text())
    except OSError as error:
        raise ValueError(
            f"artifact={folder}: no {DOCUMENT} ({error.strerror}); use a folder that export wrote"
        ) from None
    except ValueError:
        raise ValueError(f"artifact={folder}: {DOCUMENT} is truncated or corrupt; export the run again") from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA or set(document) != KEYS:
        raise ValueError(
            f"artifact={folder}: schema {schema} is not the {SCHEMA} that is read here; export the run again"
        )
    return dict(document)


def _digest(document: Mapping[str, Any], data: bytes) -> str:
    sealed = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode() + data).hexdigest()


def _prove(net: nn.Module, rebuilt: nn.Module, folder: Path) -> None:
    """Compare the states of a network and its rebuilt copy bit for bit."""
    found = rebuilt.state_dict()
    for name, tensor in net.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if name not in found or found[name].dtype != tensor.dtype or not torch.equal(found[name], tensor.cpu()):
            raise ValueError(f"artifact={folder}: {name} is not rebuilt by the model and quantizer config alone")


def _float_bytes(net: nn.Module) -> int:
    """Bytes of the float32 parameters and batch-norm statistics, quantizers and counters left out."""
    mine = [module for module in net.modules() if not isinstance(module, Quantizer)]
    tensors = [t for module in mine for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))]
    return sum(4 * tensor.numel() for tensor in tensors if tensor.is_floating_point())
