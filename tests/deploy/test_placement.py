from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from onnx import numpy_helper
from torch import Tensor, nn

import research.models
from research.deploy.biases import round_biases
from research.deploy.deployed import deployed
from research.deploy.graph import record_graph
from research.deploy.onnx import export_onnx
from research.deploy.placement import place
from research.models.blocks import PadShortcut
from research.quant.calibrate import calibrate
from research.quant.conv_bn import merge_batchnorm
from research.quant.convert import convert
from research.quant.recipe import Recipe

Make = Callable[..., tuple[nn.Module, dict[str, Any], Tensor]]


def lsq(bits: int, **options: Any) -> dict[str, Any]:
    return {"name": "lsq", "bits": bits, **options}


def deploy_recipe(bits: int = 8, narrow: bool = False) -> dict[str, Any]:
    """conf/quantizer/lsq_deploy.yaml, its one interpolation filled in."""
    recipe = yaml.safe_load(Path("conf/quantizer/lsq_deploy.yaml").read_text().replace("${quantizer.bits}", str(bits)))
    if bits < 8:
        recipe["rules"][2]["input"]["bits"] = bits
    recipe["rules"][3]["output"]["narrow"] = narrow
    return dict(recipe)


def optimised(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    """Operators of the graph that ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)


def run(model: onnx.ModelProto, x: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")  # exact on processors without VNNI too
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


def ready(quantized: Make, model: str, recipe: dict[str, Any], **options: Any) -> tuple[nn.Module, Tensor]:
    """A finalised network with integer biases and a batch."""
    net, _, x = quantized(model, recipe, **options)
    merge_batchnorm(net)
    round_biases(net, x[:1])
    return net, x


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("shortcut", "convs"), [("A", 7), ("B", 9)])
def test_the_deploy_recipe_runs_in_integers_from_end_to_end(
    quantized: Make, tmp_path: Path, shortcut: str, convs: int, bits: int
) -> None:
    net, x = ready(quantized, "resnet8", deploy_recipe(bits), batch=4, shortcut=shortcut)
    exported = export_onnx(net, x[:1], tmp_path / "net.onnx")
    assert not {"Relu", "BatchNormalization"} & {node.op_type for node in exported.graph.node}
    operators = optimised(exported, tmp_path)
    assert operators["QLinearConv"] == convs and operators["QLinearAdd"] == 3
    assert operators["QLinearGlobalAveragePool"] == operators["QGemm"] == 1
    assert not operators["Conv"] + operators["Gemm"]
    if bits == 8:
        assert operators["QuantizeLinear"] == 1, "the image alone is quantized by a pass of its own"
        assert operators["DequantizeLinear"] == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_what_it_computes_is_what_the_network_computes(quantized: Make, tmp_path: Path, bits: int) -> None:
    net, x = ready(quantized, "resnet8", deploy_recipe(bits, narrow=True), batch=32)
    with torch.no_grad():
        expected = net(x)
    error = (run(export_onnx(net, x[:1], tmp_path / "net.onnx"), x) - expected).abs()
    assert float(error.median()) < 1e-2 * float(expected.abs().mean())  # single codes fall to the other side


@torch.no_grad()
def test_biases_are_rounded_once_by_half_a_unit_at_most(quantized: Make) -> None:
    net, _, x = quantized("resnet8", deploy_recipe())
    merge_batchnorm(net)
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    moved = round_biases(net, x[:1])
    convs = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    assert sorted(moved) == sorted(convs) and max(moved.values()) > 0
    for name, parameter in net.named_parameters():
        layer, _, kind = name.rpartition(".")
        if kind == "bias" and layer in moved:
            step = net.get_submodule(layer).output_quantizer
            assert float((parameter - before[name]).abs().max()) == pytest.approx(moved[layer], abs=1e-9)
            if step is not None:
                assert moved[layer] < 0.02 * float(step.scale)
        else:
            assert torch.equal(parameter, before[name])
    assert max(round_biases(net, x[:1]).values()) == 0


def test_a_bias_that_is_no_integer_stays_a_float_add(quantized: Make, tmp_path: Path) -> None:
    net, _, x = quantized("resnet8", deploy_recipe())
    merge_batchnorm(net)
    export_onnx(net, x[:1], tmp_path / "float.onnx")
    names = {node.name for node in onnx.load(tmp_path / "float.onnx").graph.node}
    assert "layer1.0.conv1.biased" in names and "layer1.0.conv1.bias.codes" not in names
    with torch.no_grad():
        expected, found = net(x), run(onnx.load(tmp_path / "float.onnx"), x)
    assert float((found - expected).abs().median()) < 1e-5


def test_four_bit_weights_are_stretched_without_a_change(quantized: Make, tmp_path: Path) -> None:
    net, x = ready(quantized, "resnet8", deploy_recipe(4))
    model = export_onnx(net, x[:1], tmp_path / "net.onnx")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    codes, scale = (constants[f"layer1.0.conv1.weight.{key}"] for key in ("codes", "scale"))
    assert codes.dtype == np.int8 and np.abs(codes).max() == 16 * 7 and not (codes % 16).any()
    weight = net.get_submodule("layer1.0.conv1").quantized_weight().detach().numpy()
    assert np.array_equal(codes * scale.reshape(-1, 1, 1, 1), weight)


def chain(*modules: nn.Module, signed: bool | str = "auto", bits: int = 4) -> tuple[nn.Module, Tensor]:
    """Convolution, ``modules``, convolution: both quantized, the norms among them uneven and of both signs."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), *modules, nn.Conv2d(12, 4, 3))
    for module in modules:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            module.weight.data[0] = 0
    recipe = {"weight": lsq(bits), "input": lsq(bits, signed=signed)}
    convert(net, Recipe.from_config(recipe), "0", str(len(net) - 1))
    x = torch.randn(4, 3, 12, 12)
    calibrate(net.eval().requires_grad_(False), [x])
    return net, x


CHAINS = {
    "relu": [nn.BatchNorm2d(8), nn.ReLU(), PadShortcut(1, 8, 12)],
    "relu6, max-pool": [nn.BatchNorm2d(8), nn.ReLU6(), nn.MaxPool2d(3, 2, 1), PadShortcut(1, 8, 12)],
    "two clips": [nn.Hardtanh(-0.4, 0.7), nn.Dropout(), nn.ReLU(), PadShortcut(2, 8, 12)],
    "pad, max-pool": [PadShortcut(1, 8, 12), nn.BatchNorm2d(12), nn.Identity(), nn.MaxPool2d(2)],
}


@pytest.mark.parametrize("signed", [True, "auto"])
@pytest.mark.parametrize("kind", CHAINS)
def test_a_quantizer_goes_past_what_it_may_and_nothing_changes(tmp_path: Path, kind: str, signed: bool | str) -> None:
    net, x = chain(*CHAINS[kind], signed=signed)
    model = export_onnx(net, x[:1], tmp_path / "net.onnx")
    assert float((run(model, x) - net(x)).abs().max()) < 1e-5
    operators = Counter(node.op_type for node in model.graph.node)
    assert operators["QuantizeLinear"] == 2 and not operators["Relu"]
    order = [node.op_type for node in model.graph.node]
    if kind != "pad, max-pool":  # there the norm, behind no convolution, keeps its place
        assert order.index("Pad") > len(order) - 1 - order[::-1].index("QuantizeLinear")
        assert not operators["BatchNormalization"]


def test_a_clip_that_cuts_off_zero_holds_a_quantizer_behind_a_pad(tmp_path: Path) -> None:
    net, x = chain(PadShortcut(1, 8, 12), nn.Hardtanh(0.3, 0.9))
    model = export_onnx(net, x[:1], tmp_path / "net.onnx")
    order = [node.name for node in model.graph.node]
    assert order.index("1") < order.index("3.input.codes") and "2" not in order
    assert float((run(model, x) - net(x)).abs().max()) < 1e-5


def test_what_several_modules_read_keeps_its_quantizers_apart(quantized: Make) -> None:
    net, _, x = quantized("resnet8", {"weight": lsq(8), "input": lsq(8)})
    placement = place(record_graph(deployed(net), x))
    assert placement.wishes["layer1.0.conv1"].name == "layer1.0.conv2.input", "past norm and ReLU"
    assert "relu" not in placement.wishes, "the block's convolution and its shortcut read it"
    assert placement.norms["conv1"] is not None and "bn1" in placement.merged


def test_a_code_that_has_no_negative_keeps_the_batch_norm_apart(tmp_path: Path) -> None:
    net, x = chain(nn.BatchNorm2d(8), nn.ReLU(), PadShortcut(1, 8, 12), bits=8)
    with torch.no_grad():
        net[1].weight[1] = -1.0
        net[0].weight[1, 0, 0, 0] = -1000.0
    model = export_onnx(net, x[:1], tmp_path / "net.onnx")
    assert "BatchNormalization" in {node.op_type for node in model.graph.node}
    with torch.no_grad():
        assert float((run(model, x) - net(x)).abs().max()) < 1e-4 * float(net(x).abs().max())


def test_every_model_of_the_recipe_converts() -> None:
    for model, options in (("resnet20", {}), ("resnet20", {"shortcut": "B"}), ("resnet18", {})):
        net = getattr(research.models, model)(**options)
        structure = net.structure()
        table = convert(
            net, Recipe.from_config(deploy_recipe()), structure.first, structure.last, None, structure.conv_bn
        )
        for name, slots in table.items():
            assert (slots["output"] is not None) == name.endswith((".conv2", ".downsample.0")), name
            assert (slots["input"] is None) == name.endswith((".conv1", ".downsample.0")), name
