"""Parity: does ONNX Runtime compute what the finalised network computes?

The criterion of the house: at least 99.5 % equal argmax and deployed accuracy within 0.1 points. Deep networks are not
bit-exact: a runtime adds in another order, and a value on the edge between two codes then falls to the other side.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from research.deploy.deployed import deployed, deployed_weights
from research.deploy.graph import INPUT, record_graph
from research.deploy.onnx import export_onnx
from research.quant.quantizers import Quantizer

Batches = Iterable[tuple[Tensor, Tensor]]


def parity_report(
    net: nn.Module, onnx_path: Path | str, batches: Batches, control: nn.Module | None = None
) -> dict[str, Any]:
    """Run PyTorch over all batches, then ONNX Runtime over all batches, and compare. Plain numbers, fit for JSON.

    Keys: ``count``; ``max_abs_diff``, ``mean_abs_diff`` of the outputs; ``argmax_agreement``; ``top1_torch``,
    ``top1_onnx`` (fractions); ``operators`` (histogram); ``float_weights`` (quantized layers whose weight in the file
    is not made from integers: must be empty); ``beyond_one_lsb`` (fraction of outputs that differ by more than one
    step of the network's output quantizer; only where the network's output is quantized); with ``control``, the same
    numbers for it under ``control``: what the runtime alone changes.

    Args:
        net: the finalised network.
        onnx_path: its export.
        batches: inputs and labels, on the device of ``net``; read twice, in the same order.
        control: a float network to export and compare by the same procedure.

    Raises:
        ValueError: ONNX Runtime is not installed or refuses the file, or batches that cannot be read twice.
    """
    onnx_path = Path(onnx_path)
    model = onnx.load(onnx_path)
    net = deployed(net)
    example = _first(batches)
    report = _compare(net, onnx_path, batches, _output_step(net, example))
    report["operators"] = dict(sorted(Counter(node.op_type for node in model.graph.node).items()))
    report["float_weights"] = float_weights(model, list(deployed_weights(net)))
    if control is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "control.onnx"
            export_onnx(control, example, path)
            report["control"] = _compare(deployed(control), path, batches, None)
    return report


def float_weights(model: onnx.ModelProto, layers: list[str]) -> list[str]:
    """Those of the quantized ``layers`` whose Conv or Gemm does not read its weight from integer codes."""
    producers = {output: node for node in model.graph.node for output in node.output}
    integers = {tensor.name for tensor in model.graph.initializer if tensor.data_type != onnx.TensorProto.FLOAT}
    weights = {node.name: node.input[1] for node in model.graph.node if node.op_type in ("Conv", "Gemm")}

    def from_codes(name: str) -> bool:
        producer = producers.get(weights.get(name, ""))
        return producer is not None and producer.op_type == "DequantizeLinear" and producer.input[0] in integers

    return [name for name in layers if not from_codes(name)]


def _first(batches: Batches) -> Tensor:
    for images, _ in batches:
        return images
    raise ValueError("parity: there is no batch to compare on")


def _output_step(net: nn.Module, example: Tensor) -> float | None:
    """Step of the quantizer on the network's output, None if there is none."""
    last = net.get_submodule(record_graph(net, example).output)
    quantizer = getattr(last, "output_quantizer", None)
    return float(quantizer.scale) if isinstance(quantizer, Quantizer) else None


@torch.no_grad()
def _torch_outputs(net: nn.Module, batches: Batches) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and labels of all batches."""
    pairs = [(net(images).float().cpu(), labels.cpu()) for images, labels in batches]
    return [output for output, _ in pairs], [labels for _, labels in pairs]


def _onnx_outputs(path: Path, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs and labels of all batches from ONNX Runtime, without the spinning threads that would slow PyTorch."""
    try:
        import onnxruntime
    except ImportError:
        raise ValueError("parity needs ONNX Runtime, which is not installed: pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # exact sums of codes: without it, kernels for x86 processors without VNNI saturate pairs of products at 16 bits
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own exception types derive from Exception only
        raise ValueError(f"ONNX Runtime refuses {path}: {' '.join(str(error).split())}") from error
    for images, labels in batches:
        (output,) = session.run(None, {INPUT: images.float().cpu().numpy()})
        yield torch.from_numpy(output), labels.cpu()


def _compare(net: nn.Module, path: Path, batches: Batches, step: float | None) -> dict[str, Any]:
    expected, labels = _torch_outputs(net, batches)
    found = list(_onnx_outputs(path, batches))
    same = len(found) == len(labels) and all(torch.equal(a, b) for (_, a), b in zip(found, labels, strict=True))
    if not same:
        raise ValueError("parity: the batches must be the same when read twice; give a list or an unshuffled loader")
    a, b, target = torch.cat(expected), torch.cat([output for output, _ in found]), torch.cat(labels)
    diff = (a - b).abs()
    report: dict[str, Any] = {
        "count": len(target),
        "max_abs_diff": float(diff.max()),
        "mean_abs_diff": float(diff.mean()),
        "argmax_agreement": float((a.argmax(1) == b.argmax(1)).double().mean()),
        "top1_torch": float((a.argmax(1) == target).double().mean()),
        "top1_onnx": float((b.argmax(1) == target).double().mean()),
    }
    if step is not None:
        report["beyond_one_lsb"] = float((diff > step * (1 + 1e-3)).double().mean())
    return report
