from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from research.deploy.affine import affine_codes
from research.deploy.deployed import DeployedWeight, deployed, install
from research.deploy.onnx import export_onnx
from research.deploy.parity import float_weights
from research.models.blocks import PadShortcut
from research.quant.convert import convert
from research.quant.grid import Grid
from research.quant.layers import quant_layers
from research.quant.output_scale import OutputScale
from research.quant.quantizers import REGISTRY, QuantizerSpec, build_quantizer
from research.quant.recipe import Recipe

Make = Callable[..., tuple[nn.Module, dict[str, Any], Tensor]]
LSQ4 = {"weight": {"name": "lsq", "bits": 4}, "input": {"name": "lsq", "bits": 4}}


def run(model: onnx.ModelProto, x: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")  # exact on processors without VNNI too
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


def single(layer: nn.Module, recipe: dict[str, Any], x: Tensor) -> nn.Module:
    """One calibrated quantized layer as a network."""
    net = nn.Sequential(layer)
    convert(net, Recipe.from_config(recipe), "0", "0")
    quantized = net[0]
    for quantizer, data in ((quantized.weight_quantizer, quantized.weight), (quantized.input_quantizer, x)):
        if quantizer is not None:
            quantizer.initialise(data.detach())
    return net.eval()


def difference(net: nn.Module, model: onnx.ModelProto, x: Tensor) -> float:
    with torch.no_grad():
        return float((run(model, x) - net(x)).abs().max())


LAYERS = {
    "conv": lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=True),
    "grouped": lambda: nn.Conv2d(8, 8, (3, 1), padding=(1, 0), groups=4, dilation=(2, 1), bias=False),
    "linear": lambda: nn.Linear(8, 6),
}


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("signed", [True, False])
def test_a_single_layer_agrees(tmp_path: Path, kind: str, granularity: str, signed: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 8) if kind == "linear" else torch.randn(5, 8, 9, 9)
    x = x if signed else x.relu()
    weight = {"name": "lsq", "bits": 4, "granularity": granularity}
    net = single(LAYERS[kind](), {"weight": weight, "input": {"name": "lsq", "bits": 4}}, x)
    model = export_onnx(net, x[:2], tmp_path / "layer.onnx")
    assert difference(net, model, x) < 1e-5
    codes = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert codes["0.weight.codes"].dtype == np.int8 and np.abs(codes["0.weight.codes"]).max() <= 8
    assert codes["0.input.qmax"] == (128 + 7 if signed else 15)
    assert codes["0.input.zero_point"] == (128 if signed else 0) and codes["0.input.zero_point"].dtype == np.uint8


@pytest.mark.parametrize("tampering", ["input zero point", "axis", "clip", "weight code"])
def test_the_single_layer_check_finds_faults(tmp_path: Path, tampering: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 8, 9, 9)
    weight = {"name": "lsq", "bits": 4, "granularity": "channel"}
    net = single(nn.Conv2d(8, 8, 3), {"weight": weight, "input": {"name": "lsq", "bits": 4}}, x)
    model = export_onnx(net, x, tmp_path / "layer.onnx")
    constants = {tensor.name: tensor for tensor in model.graph.initializer}

    def change(name: str, by: int) -> None:
        array = numpy_helper.to_array(constants[name]).copy()
        array.reshape(-1)[0] = int(array.reshape(-1)[0]) + by
        constants[name].CopyFrom(numpy_helper.from_array(array, name))

    if tampering == "axis":
        node = next(node for node in model.graph.node if node.name == "0.weight")
        node.attribute[0].i = 1
    elif tampering == "input zero point":  # of the encoding alone: a zero point common to both ends would cancel
        node = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
        model.graph.initializer.append(numpy_helper.from_array(np.array(129, np.uint8), "wrong"))
        node.input[2] = "wrong"
    else:
        change({"clip": "0.input.qmax", "weight code": "0.weight.codes"}[tampering], -1)
    assert difference(net, model, x) > 1e-3


def test_ties_fall_to_the_same_code(tmp_path: Path) -> None:
    net = single(nn.Linear(1, 1, bias=False), LSQ4, torch.ones(1, 1))
    nn.init.constant_(net[0].input_quantizer.raw_scale, 0.125)
    net[0].input_quantizer.signed.fill_(True)
    x = (torch.arange(-20, 20).reshape(-1, 1) + 0.5) * 0.125
    assert difference(net, export_onnx(net, x, tmp_path / "ties.onnx"), x) == 0


NETWORKS = [
    ("resnet8", {}, 16),
    ("resnet8", {"shortcut": "B"}, 15),
    ("resnet8", {"preactivation": True}, 16),
    ("resnet8", {"preactivation": True, "shortcut": "B"}, 16),
    ("resnet20", {}, 16),
    ("vgg_small", {"image_size": 10}, 10),
    ("mobilenet_v2", {"width_mult": 0.5}, 8),
    ("resnet18", {"stem": "imagenet"}, 32),
]


@pytest.mark.parametrize(("model", "options", "size"), NETWORKS, ids=str)
def test_networks_agree(quantized: Make, tmp_path: Path, model: str, options: dict[str, Any], size: int) -> None:
    net, _, x = quantized(model, LSQ4, size=size, **options)
    exported = export_onnx(net, x[:2], tmp_path / "net.onnx")
    assert float_weights(exported, [name for name, _ in quant_layers(net)]) == []
    with torch.no_grad():
        expected = net(x)
    found = run(exported, x)
    assert float((found.argmax(1) == expected.argmax(1)).double().mean()) >= 0.995
    assert float((found - expected).abs().median()) < 1e-3 * float(expected.abs().mean())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", [name for name in REGISTRY if name not in ("lq_nets", "binary")])
def test_every_quantizer_agrees(tmp_path: Path, name: str, bits: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 8, 9, 9)
    for data in (x, x.relu()):
        recipe = {"weight": {"name": name, "bits": bits}, "input": {"name": name, "bits": bits}}
        net = single(nn.Conv2d(8, 6, 3), recipe, data)
        assert difference(net, export_onnx(net, data, tmp_path / "layer.onnx"), data) < 2e-5


def test_binary_weights_agree_and_what_is_not_affine_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, path = torch.randn(5, 8, 9, 9), tmp_path / "layer.onnx"
    binary = {"name": "binary", "bits": 1}
    for granularity in ("tensor", "channel"):
        net = single(nn.Conv2d(8, 6, 3), {**LSQ4, "weight": {**binary, "granularity": granularity}}, x)
        assert difference(net, export_onnx(net, x, path), x) < 2e-5
    lq_nets = {"name": "lq_nets", "bits": 2}
    for recipe, refused in (
        ({**LSQ4, "weight": lq_nets}, r"0: weights of lq_nets \(codebook grid\) have no form"),
        ({**LSQ4, "input": lq_nets}, r"LQNets \(mode quantize, grid codebook\) has no form"),
        ({**LSQ4, "input": binary}, r"Binary \(mode quantize, grid midrise\) has no form"),
    ):
        with pytest.raises(ValueError, match=refused):
            export_onnx(single(nn.Conv2d(8, 6, 3), recipe, x), x, path)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("minmax", {"symmetric": False}),
        ("lsq_plus", {"configuration": "C3"}),
        ("lsq_plus", {"offset": "integer"}),
        ("pact", {"lower": -1.0}),
    ],
)
def test_inputs_with_an_offset_agree(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 8, 9, 9) + 0.3
    recipe = {**LSQ4, "input": {"name": name, "bits": 4, "options": options}}
    net = single(nn.Conv2d(8, 6, 3), recipe, x)
    assert difference(net, export_onnx(net, x, tmp_path / "layer.onnx"), x) < 1e-5


def test_weights_with_zero_points_agree(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 8, 9, 9)
    options = {"symmetric": False}
    weight = {"name": "minmax", "bits": 4, "granularity": "channel", "init": "minmax", "options": options}
    net = single(nn.Conv2d(8, 6, 3), {**LSQ4, "weight": weight}, x)
    model = export_onnx(net, x, tmp_path / "layer.onnx")
    zero_points = next(t for t in model.graph.initializer if t.name == "0.weight.zero_point")
    assert len(set(numpy_helper.to_array(zero_points).tolist())) > 1
    assert difference(net, model, x) < 1e-5


def test_output_quantizers_and_scales_agree(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 8, 9, 9)
    net = single(nn.Conv2d(8, 6, 3), {**LSQ4, "output": {"name": "minmax", "bits": 8, "init": "minmax"}}, x)
    net[0].output_quantizer.initialise(torch.tensor([-3.0, 3.0]))
    with torch.no_grad():
        steps = (run(export_onnx(net, x, tmp_path / "quantized.onnx"), x) - net(x)).abs() / net[
            0
        ].output_quantizer.scale
    assert float(steps.max()) < 1.001 and float((steps > 0.001).double().mean()) < 0.01
    net[0].output_quantizer = OutputScale()
    nn.init.constant_(net[0].output_quantizer.output_scale, -0.5)
    assert difference(net, export_onnx(net, x, tmp_path / "scaled.onnx"), x) < 1e-5


def test_float_layers_and_plain_modules_agree(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=2), nn.BatchNorm2d(4), nn.Hardtanh(-0.5, 0.75), nn.AvgPool2d(3, 2, 1), nn.ReLU6(),
        PadShortcut(2, 4, 8), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.Dropout(0.5), nn.Identity(), nn.Flatten(),
        nn.Linear(32, 5),
    ).eval()  # fmt: skip
    x = torch.randn(3, 3, 10, 10)
    assert difference(net, export_onnx(net, x[:1], tmp_path / "float.onnx"), x) < 1e-5


def test_folded_batch_norms_agree(quantized: Make, tmp_path: Path) -> None:
    """Also a guard of the biases: the runtime rounds one that is an input of Conv, and the logits move by 0.07."""
    net, _, x = quantized("resnet8", {**LSQ4, "fold_bn": 4})
    model = export_onnx(net, x, tmp_path / "net.onnx")
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    with torch.no_grad():
        assert float((run(model, x) - net(x)).abs().median()) < 1e-5


def test_codes_beyond_a_byte_stay_integers(tmp_path: Path) -> None:
    x = torch.rand(5, 8, 9, 9)
    recipe = {"weight": {"name": "dorefa", "bits": 8}, "input": {"name": "dorefa", "bits": 8}}
    model = export_onnx(single(nn.Conv2d(8, 6, 3), recipe, x), x, tmp_path / "layer.onnx")
    codes = next(tensor for tensor in model.graph.initializer if tensor.name == "0.weight.codes")
    assert codes.data_type == onnx.TensorProto.INT32 and np.abs(numpy_helper.to_array(codes)).max() == 255
    assert "Clip" not in {node.op_type for node in model.graph.node}


def test_what_has_no_form_is_named(tmp_path: Path) -> None:
    path, x = tmp_path / "net.onnx", torch.randn(2, 8, 9, 9)
    with pytest.raises(ValueError, match="1: GELU has no ONNX form"):
        export_onnx(nn.Sequential(nn.Conv2d(8, 8, 3), nn.GELU()), x, path)
    with pytest.raises(ValueError, match=r"0: padding=\(1, 1\) \(reflect\)"):
        export_onnx(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")), x, path)
    net = deployed(single(nn.Conv2d(8, 8, 3), LSQ4, x))
    codes = torch.randint(0, 16, net[0].weight.shape)
    spec = QuantizerSpec("lsq", 4)
    install(net[0], DeployedWeight(spec, Grid("codebook"), torch.tensor(4.0), codes, torch.randn(16), None))
    with pytest.raises(ValueError, match=r"0: weights of lsq \(codebook grid\) have no form"):
        export_onnx(net, x, path)
    net = single(nn.Conv2d(8, 8, 3), LSQ4, x)
    net[0].input_quantizer.mode = "relax"
    with pytest.raises(ValueError, match=r"0\.input: LSQ \(mode relax"):
        export_onnx(net, x, path)
    assert not path.exists()


def test_a_quantizer_that_is_not_affine_is_found_out() -> None:
    quantizer = build_quantizer(QuantizerSpec("lsq", 4), (), None, "input")
    quantizer.initialise(torch.rand(100))
    assert affine_codes(quantizer, "conv").qmax == 15
    quantizer.transform = lambda x: torch.clamp((x / quantizer.scale) ** 2, 0, 15)
    with pytest.raises(ValueError, match="conv: LSQ .* has no form"):
        affine_codes(quantizer, "conv")
