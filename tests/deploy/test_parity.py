from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from research.deploy.deployed import deployed
from research.deploy.onnx import export_onnx
from research.deploy.parity import float_weights, parity_report
from research.models import resnet8
from research.quant.calibrate import calibrate
from research.quant.convert import convert
from research.quant.recipe import Recipe

Make = Callable[..., tuple[nn.Module, dict[str, Any], Tensor]]
LSQ4 = {"weight": {"name": "lsq", "bits": 4}, "input": {"name": "lsq", "bits": 4}}


def batches(net: nn.Module, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Two batches whose labels the network gets right but for the first."""
    with torch.no_grad():
        labels = net(x).argmax(1)
    labels[0] = (labels[0] + 1) % 10
    return [(x[:10], labels[:10]), (x[10:], labels[10:])]


def test_wide_sums_of_codes_are_not_saturated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(64, 8, 3), nn.Flatten(), nn.Linear(8, 10))
    recipe = {"weight": {"name": "lsq", "bits": 8}, "input": {"name": "lsq", "bits": 8}}
    convert(net, Recipe.from_config(recipe), "0", "2")
    with torch.no_grad():
        net[0].weight.abs_()
    x = torch.rand(16, 64, 3, 3)
    calibrate(net, [x])
    net = deployed(net.eval())
    export_onnx(net, x, tmp_path / "net.onnx")
    assert parity_report(net, tmp_path / "net.onnx", batches(net, x))["max_abs_diff"] < 1e-4


def test_the_report_of_a_good_export(
    quantized: Make, uneven_norms: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    net, _, x = quantized("resnet8", LSQ4)
    export_onnx(net, x, tmp_path / "net.onnx")
    report = parity_report(net, tmp_path / "net.onnx", batches(net, x), control=uneven_norms(resnet8()))
    assert report["count"] == 16
    assert report["argmax_agreement"] == 1
    assert report["top1_torch"] == report["top1_onnx"] == 15 / 16
    assert 0 <= report["mean_abs_diff"] <= report["max_abs_diff"] < 0.5
    assert report["operators"]["QuantizeLinear"] == 8 and report["operators"]["Conv"] == 7
    assert report["float_weights"] == []
    assert "beyond_one_lsb" not in report
    assert report["control"]["max_abs_diff"] < 1e-4 and report["control"]["argmax_agreement"] == 1


def test_the_report_of_another_network_shows_it(quantized: Make, tmp_path: Path) -> None:
    net, _, x = quantized("resnet8", LSQ4)
    other, _, _ = quantized("resnet8", LSQ4, shortcut="B")
    export_onnx(other, x, tmp_path / "net.onnx")
    report = parity_report(net, tmp_path / "net.onnx", batches(net, x))
    assert report["argmax_agreement"] < 0.9 and report["max_abs_diff"] > 0.1


def test_quantized_outputs_are_counted_in_steps(quantized: Make, tmp_path: Path) -> None:
    eight = {"name": "lsq", "bits": 8}
    output = {"name": "minmax", "bits": 8, "init": "minmax"}
    rules = [{"match": "@last", "weight": eight, "input": eight, "output": output}]
    net, _, x = quantized("resnet8", {**LSQ4, "rules": rules})
    export_onnx(net, x, tmp_path / "net.onnx")
    assert parity_report(net, tmp_path / "net.onnx", batches(net, x))["beyond_one_lsb"] < 0.05
    with torch.no_grad():
        net.fc.bias += 3 * net.fc.output_quantizer.scale
    assert parity_report(net, tmp_path / "net.onnx", batches(net, x))["beyond_one_lsb"] > 0.9


def test_float_weights_are_found(quantized: Make, tmp_path: Path) -> None:
    net, _, x = quantized("resnet8", LSQ4)
    model = export_onnx(net, x, tmp_path / "net.onnx")
    conv = next(node for node in model.graph.node if node.name == "layer1.0.conv1")
    model.graph.initializer.append(numpy_helper.from_array(net.layer1[0].conv1.weight.detach().numpy(), "float"))
    conv.input[1] = "float"
    assert float_weights(model, ["conv1", "layer1.0.conv1", "gone"]) == ["layer1.0.conv1", "gone"]


def test_batches_that_cannot_be_read_twice_are_refused(quantized: Make, tmp_path: Path) -> None:
    net, _, x = quantized("resnet8", LSQ4)
    export_onnx(net, x, tmp_path / "net.onnx")
    with pytest.raises(ValueError, match="read twice"):
        parity_report(net, tmp_path / "net.onnx", iter(batches(net, x)))
    with pytest.raises(ValueError, match="no batch"):
        parity_report(net, tmp_path / "net.onnx", [])


def test_a_missing_runtime_or_a_file_that_it_refuses_is_one_line(
    quantized: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, _, x = quantized("resnet8", LSQ4)
    model = export_onnx(net, x, tmp_path / "net.onnx")
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "bad.onnx")
    with pytest.raises(ValueError, match=r"ONNX Runtime refuses .*bad\.onnx") as caught:
        parity_report(net, tmp_path / "bad.onnx", batches(net, x))
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match="pip install onnxruntime"):
        parity_report(net, tmp_path / "net.onnx", batches(net, x))
