from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import research
from research.deploy.artifact import DOCUMENT, TENSORS, _digest, load_artifact, save_artifact
from research.deploy.deployed import DeployedWeight, deployed, install
from research.quant.grid import Grid
from research.quant.layers import quant_layers, quantized_weights
from research.quant.output_scale import OutputScale
from research.quant.passes import passes
from research.quant.quantizers import REGISTRY, QuantizerSpec, quantizer_class
from research.quant.quantizers.base import MAX_BITS

Make = Callable[..., tuple[nn.Module, dict[str, Any], Tensor]]


def both(name: str, bits: int, granularity: str = "tensor", **more: Any) -> dict[str, Any]:
    """A recipe with one quantizer for weights and inputs."""
    weight = {"name": name, "bits": bits, "granularity": granularity, **more}
    return {"weight": weight, "input": {"name": name, "bits": bits}}


def assert_same(net: nn.Module, config: dict[str, Any], x: Tensor, folder: Path, **options: Any) -> nn.Module:
    """Save, load, and compare weights and outputs bit for bit; `net` itself must not move."""
    before = copy.deepcopy(net.state_dict())
    save_artifact(net, config, folder, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    loaded = load_artifact(folder)
    with torch.no_grad():
        assert torch.equal(loaded(x), net.eval()(x))
    assert not loaded.training
    return loaded


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_round_trip_is_bitwise(quantized: Make, tmp_path: Path, bits: int, granularity: str) -> None:
    net, config, x = quantized("resnet8", both("lsq", bits, granularity))
    loaded = assert_same(net, config, x, tmp_path)
    expected, found = quantized_weights(net), quantized_weights(loaded)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_deeper_networks_round_trip_too(quantized: Make, tmp_path: Path) -> None:
    assert_same(*quantized("resnet20", both("lsq", 4), shortcut="B"), tmp_path)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("name", [name for name in REGISTRY if quantizer_class(name).max_bits == MAX_BITS])
def test_every_quantizer_round_trips(quantized: Make, tmp_path: Path, name: str, bits: int) -> None:
    assert_same(*quantized("resnet8", both(name, bits)), tmp_path)


@pytest.mark.parametrize(
    "recipe",
    [
        {"weight": {"name": "dorefa", "bits": 1}, "input": {"name": "pact", "bits": 1}},
        {"weight": {"name": "ewgs", "bits": 1}, "input": {"name": "lsq", "bits": 1}},
        {"weight": {"name": "binary", "bits": 1, "granularity": "channel"}, "input": None},
        {"weight": {"name": "lq_nets", "bits": 2, "granularity": "channel"}, "input": {"name": "lq_nets", "bits": 1}},
        {
            "weight": {"name": "minmax", "bits": 4, "granularity": "channel", "options": {"symmetric": False}},
            "input": {"name": "minmax", "bits": 4, "options": {"symmetric": False}},
        },
        {
            "weight": {"name": "lsq", "bits": 3, "narrow": True},
            "input": {"name": "lsq_plus", "bits": 3, "options": {"configuration": "C3"}},
        },
        {"weight": {"name": "lsq", "bits": 0}, "input": {"name": "lsq", "bits": 0}},
        {"weight": {"name": "lsq", "bits": 4}, "input": None, "rules": []},
    ],
    ids=[
        "1 bit",
        "1 bit ewgs",
        "binary",
        "bases per channel",
        "asymmetric",
        "narrow and offset",
        "0 bits",
        "float inputs",
    ],
)
def test_special_grids_round_trip(quantized: Make, tmp_path: Path, recipe: dict[str, Any]) -> None:
    assert_same(*quantized("resnet8", recipe), tmp_path)


@pytest.mark.parametrize("strategy", [0, 1, 2, 3, 4])
def test_folded_batch_norms_round_trip(quantized: Make, tmp_path: Path, strategy: int) -> None:
    net, config, x = quantized("resnet8", {**both("lsq", 4, "channel"), "fold_bn": strategy})
    loaded = assert_same(net, config, x, tmp_path)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in loaded.modules())


def test_quantized_outputs_and_exchanged_modules_round_trip(quantized: Make, tmp_path: Path) -> None:
    replace = [{"match": r"layer\d\.0\.relu1", "module": {"_target_": "torch.nn.Hardtanh", "min_val": 0.0}}]
    outputs = [{"match": r".*\.add", "quantizer": {"name": "minmax", "bits": 8}}]
    recipe = {**both("lsq", 4), "outputs": outputs}
    recipe["output"] = {"name": "lsq", "bits": 8}
    torch.manual_seed(0)
    net, config, x = quantized("resnet8", recipe)
    loaded = assert_same(net, config, x, tmp_path)
    assert repr(loaded.layer1[0].add) == repr(net.layer1[0].add)
    for block in (net.layer1[0], net.layer2[0], net.layer3[0]):
        block.relu1 = nn.Hardtanh(0.0)
    assert_same(net, config, x, tmp_path, replace=replace)


def test_output_scales_round_trip(quantized: Make, tmp_path: Path) -> None:
    net, config, x = quantized("resnet8", both("ewgs", 2))
    net.layer1[0].conv1.output_quantizer = OutputScale()
    nn.init.constant_(net.layer1[0].conv1.output_quantizer.output_scale, -0.3)
    assert_same(net, config, x, tmp_path)


@pytest.mark.parametrize("width", [2, 4])
def test_one_of_several_widths_is_deployed(quantized: Make, tmp_path: Path, width: int) -> None:
    net, config, x = quantized("resnet8", {**both("lsq", 4), "widths": [2, 4], "rules": []})
    with passes(net, bits=width, batchnorm=width):
        loaded = assert_same(net, config, x, tmp_path)
    assert {int(layer.weight_quantizer.bits) for _, layer in quant_layers(loaded)} == {width}


def test_widths_per_channel_round_trip(quantized: Make, tmp_path: Path) -> None:
    net, config, x = quantized("resnet8", both("lsq", 4, "channel"))
    quantizer = net.layer1[0].conv1.weight_quantizer
    quantizer.bits = torch.tensor([2.0, 4.0] * 8).reshape(-1, 1, 1, 1)
    assert_same(net, config, x, tmp_path)


@pytest.mark.parametrize("kind", ["codebook", "log"])
def test_grids_without_equal_steps_round_trip(quantized: Make, tmp_path: Path, kind: str) -> None:
    net, config, x = quantized("resnet8", both("lsq", 3))
    net = deployed(net)
    layer = net.layer2[0].conv1
    if kind == "codebook":
        codes, scale = torch.randint(0, 8, layer.weight.shape), torch.randn(8)
    else:
        codes, scale = torch.randint(-3, 4, layer.weight.shape), torch.tensor(0.5)
    spec = QuantizerSpec("lsq", 3)
    install(layer, DeployedWeight(spec, Grid(kind), torch.tensor(3.0), codes, scale, torch.tensor(-6.0)))
    assert layer.weight.unique().numel() in (7, 8)
    assert_same(net, config, x, tmp_path)


def test_the_files_hold_codes_and_are_small(quantized: Make, tmp_path: Path) -> None:
    net, config, _ = quantized("vgg_small", {**both("lsq", 4), "rules": []}, size=8, image_size=8)
    report = save_artifact(net, config, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    weights = sum(layer.weight.numel() for _, layer in quant_layers(net))
    assert report.code_bytes == weights // 2
    assert report.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert report.compression > 7.7
    assert "features.0.conv.weight" not in tensors
    assert tensors["features.0.conv.weight.codes"].dtype == torch.uint8
    large = [name for name, tensor in tensors.items() if tensor.dtype != torch.uint8 and tensor.numel() > 512]
    assert large == []


def test_load_needs_the_folder_alone_and_keeps_the_meta_data(quantized: Make, tmp_path: Path) -> None:
    net, config, x = quantized("resnet8", both("lsq", 4))
    save_artifact(net, config, tmp_path / "deep" / "folder", meta={"accuracy": 0.9})
    with torch.no_grad():
        assert torch.equal(research.load(tmp_path / "deep" / "folder")(x), net(x))
    assert json.loads((tmp_path / "deep" / "folder" / DOCUMENT).read_text())["meta"] == {"accuracy": 0.9}


def test_an_artifact_of_an_artifact_is_the_same(quantized: Make, tmp_path: Path) -> None:
    net, config, _ = quantized("resnet8", both("dorefa", 2))
    save_artifact(net, config, tmp_path / "a")
    save_artifact(load_artifact(tmp_path / "a"), config, tmp_path / "b")
    for name in (TENSORS, DOCUMENT):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


class Shift(nn.Module):
    """An override that the codes do not know of."""

    def forward(self, x_hat: Tensor, layer: nn.Module) -> Tensor:
        return x_hat + 0.01


def test_a_weight_that_is_not_its_codes_is_refused(quantized: Make, tmp_path: Path) -> None:
    net, config, _ = quantized("resnet8", both("lsq", 4))
    net.layer1[0].conv1.weight_override = Shift()
    with pytest.raises(ValueError, match=r"layer1\.0\.conv1: .*finalise the network"):
        save_artifact(net, config, tmp_path)


def test_a_network_that_its_config_does_not_give_back_is_refused_before_writing(
    quantized: Make, tmp_path: Path
) -> None:
    net, config, _ = quantized("resnet8", both("lsq", 4))
    with pytest.raises(ValueError, match="layer1"):
        save_artifact(net, {**config, "_target_": "research.models.resnet20"}, tmp_path)
    net.layer1[0].relu1 = nn.PReLU()
    with pytest.raises(ValueError, match=r"layer1\.0\.relu1"):
        save_artifact(net, config, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_float_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantizer recipe"):
        save_artifact(research.models.resnet8(), {"_target_": "research.models.resnet8"}, tmp_path)


def damage(folder: Path, how: str) -> None:
    """Break a good artifact."""
    tensors, document = folder / TENSORS, folder / DOCUMENT
    data = bytearray(tensors.read_bytes())
    if how == "no tensors":
        tensors.unlink()
    elif how == "no document":
        document.unlink()
    elif how == "truncated tensors":
        tensors.write_bytes(data[:-100])
    elif how == "a flipped bit":
        data[-100] ^= 1
        tensors.write_bytes(data)
    elif how == "truncated document":
        document.write_text(document.read_text()[:-100])
    elif how == "edited document":
        document.write_text(document.read_text().replace('"bits":4', '"bits":3', 1))
    elif how == "not a document":
        document.write_text("[]")
    else:
        content = json.loads(document.read_text())
        if how == "schema 2":
            content["schema"] = 2
        elif how == "refused target":
            content["model"] = {"_target_": "os.system", "command": "true"}
        elif how == "refused quantizer":
            content["table"]["conv1"]["input"]["name"] = "antigravity.fly"
        elif how == "other model":
            content["model"]["in_channels"] = 1
        elif how == "missing entry":
            del content["weights"]["conv1"]["qmin"]
        content["sha256"] = _digest(content, bytes(data))
        document.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no tensors", "no model.safetensors"),
        ("no document", "no model.json"),
        ("truncated tensors", "truncated or corrupt"),
        ("a flipped bit", "truncated or corrupt"),
        ("truncated document", "truncated or corrupt"),
        ("edited document", "truncated or corrupt"),
        ("not a document", "schema None is not the 1"),
        ("schema 2", "schema 2 is not the 1"),
        ("refused target", "os.system is refused"),
        ("refused quantizer", "antigravity.fly is refused"),
        ("other model", "codes of shape"),
        ("missing entry", "does not describe"),
    ],
)
def test_broken_artifacts_are_refused_in_one_line(quantized: Make, tmp_path: Path, how: str, message: str) -> None:
    net, config, _ = quantized("resnet8", both("lsq", 4), size=8, batch=2)
    save_artifact(net, config, tmp_path)
    damage(tmp_path, how)
    with pytest.raises(ValueError, match=message) as caught:
        load_artifact(tmp_path)
    assert str(caught.value).startswith(f"artifact={tmp_path}: ") and "\n" not in str(caught.value)
