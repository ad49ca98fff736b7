"""The worked numbers of CIFAR ResNet-20 under every convention, and the gradients of a search cost."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from research.models import resnet20
from research.quant.convert import convert
from research.quant.cost import (
    LayerCost,
    apply_convention,
    average_activation_bits,
    average_weight_bits,
    bops,
    compression,
    count_norm_parameters,
    input_memory,
    kibibytes,
    measure,
    megabytes,
    relative_bops,
    size_bits,
)
from research.quant.cost_convention import CostConvention
from research.quant.cost_report import cost_report, format_cost
from research.quant.passes import passes
from research.quant.recipe import Recipe

IMAGE = (3, 32, 32)
OWN_IMAGE_BITS = {"input_bits": None}


@cache
def float_layers(shortcut: str) -> tuple[LayerCost, ...]:
    return measure(resnet20(shortcut=shortcut), IMAGE)


def layers_at(option: str, weight: int, activation: int, **convention) -> tuple[LayerCost, ...]:
    layers = [
        replace(layer, weight_bits=torch.tensor(float(weight)), input_bits=torch.tensor(float(activation)))
        for layer in float_layers(option)
    ]
    return apply_convention(layers, CostConvention(**{**OWN_IMAGE_BITS, **convention}), "conv1", "fc")


def test_counts_of_every_layer():
    table = {layer.name: (layer.weights, layer.macs, layer.inputs, layer.outputs) for layer in float_layers("B")}
    expected = {"conv1": (432, 442368, 3072, 16384), "fc": (640, 640, 64, 10)}
    for block in range(3):
        for conv in ("conv1", "conv2"):
            expected[f"layer1.{block}.{conv}"] = (2304, 2359296, 16384, 16384)
            expected[f"layer2.{block}.{conv}"] = (9216, 2359296, 8192, 8192)
            expected[f"layer3.{block}.{conv}"] = (36864, 2359296, 4096, 4096)
    expected["layer2.0.conv1"] = (4608, 1179648, 16384, 8192)
    expected["layer3.0.conv1"] = (18432, 1179648, 8192, 4096)
    expected["layer2.0.downsample.0"] = (512, 131072, 16384, 8192)
    expected["layer3.0.downsample.0"] = (2048, 131072, 8192, 4096)
    assert table == expected
    assert {layer.name for layer in float_layers("A")} == {name for name in expected if "downsample" not in name}


@pytest.mark.parametrize(
    ("shortcut", "weights", "inner_weights", "macs", "inner_macs", "inputs", "parameters"),
    [
        ("A", 268336, 267264, 40551040, 40108032, 187456, 269722),
        ("B", 270896, 269824, 40813184, 40370176, 212032, 272474),
    ],
)
def test_totals(shortcut, weights, inner_weights, macs, inner_macs, inputs, parameters):
    layers, inner = layers_at(shortcut, 32, 32), layers_at(shortcut, 32, 32, first_last="excluded")
    assert sum(layer.weights for layer in layers) == weights
    assert sum(layer.weights for layer in inner) == inner_weights
    assert sum(layer.macs for layer in layers) == macs
    assert sum(layer.macs for layer in inner) == inner_macs
    assert sum(layer.inputs for layer in layers) == inputs
    assert max(layer.inputs for layer in layers) == 16384
    assert max(layer.inputs + layer.outputs for layer in layers) == 32768
    norms = count_norm_parameters(resnet20(shortcut=shortcut))
    assert size_bits(layers, biases=True, norm_parameters=norms) == 32 * parameters
    excluded = layers_at("B", 32, 32, shortcut="excluded")
    assert sum(layer.macs for layer in excluded) == 40551040


@pytest.mark.parametrize(
    ("weight", "activation", "first_last", "giga", "inner", "size", "kib", "mb", "average", "ratio", "memory"),
    [
        (32, 32, "all", 41.5243, 41.0706, 8586752, 1048.19, 1.073344, 32, 1, 732.25),
        (8, 8, "all", 2.5953, 2.5669, 2146688, 262.05, 0.268336, 8, 4, 183.06),
        (4, 4, "all", 0.6488, 0.6417, 1073344, 131.02, 0.134168, 4, 8, 91.53),
        (4, 4, "fixed8", 0.6701, 0.6417, 1077632, 131.55, 0.134704, 4.0160, 7.968, 93.06),
        (4, 4, "fp", 1.0954, 0.6417, 1103360, 134.69, 0.137920, 4.1119, 7.782, 102.25),
        (3, 3, "fixed8", 0.3893, 0.3610, 810368, 98.92, 0.101296, 3.0200, 10.596, 70.56),
        (2, 2, "all", 0.1622, 0.1604, 536672, 65.51, 0.067084, 2, 16, 45.77),
        (2, 2, "fixed8", 0.1888, 0.1604, 543104, 66.30, 0.067888, 2.0240, 15.811, 48.06),
        (2, 2, "fp", 0.6141, 0.1604, 568832, 69.44, 0.071104, 2.1198, 15.095, 57.25),
        (2, 32, "all", 2.5953, 2.5669, 536672, 65.51, 0.067084, 2, 16, 732.25),
    ],
)
def test_option_a_table(weight, activation, first_last, giga, inner, size, kib, mb, average, ratio, memory):
    layers = layers_at("A", weight, activation, first_last=first_last)
    assert float(bops(layers)) / 1e9 == pytest.approx(giga, abs=5.1e-5)
    excluded = layers_at("A", weight, activation, first_last="excluded")
    assert float(bops(excluded)) / 1e9 == pytest.approx(inner, abs=5.1e-5)
    assert size_bits(layers) == size
    assert float(kibibytes(size_bits(layers))) == pytest.approx(kib, abs=5.1e-3)
    assert float(megabytes(size_bits(layers))) == pytest.approx(mb, abs=1e-9)
    assert float(average_weight_bits(layers)) == pytest.approx(average, abs=5.1e-5)
    assert float(compression(layers)) == pytest.approx(ratio, abs=5.1e-4)
    assert float(kibibytes(input_memory(layers))) == pytest.approx(memory, abs=5.1e-3)
    assert float(relative_bops(layers)) == pytest.approx(giga / 41.5243, abs=2e-6)


@pytest.mark.parametrize(
    ("bits", "first_last", "giga", "inner", "size", "average"),
    [
        (32, "all", 41.7927, 41.3391, 8668672, 32),
        (4, "fixed8", 0.6743, 0.6459, 1087872, 4.0158),
        (2, "fixed8", 0.1898, 0.1615, 548224, 2.0237),
        (2, "fp", 0.6151, 0.1615, 573952, None),
    ],
)
def test_option_b_table(bits, first_last, giga, inner, size, average):
    layers = layers_at("B", bits, bits, first_last=first_last)
    assert float(bops(layers)) / 1e9 == pytest.approx(giga, abs=5.1e-5)
    excluded = layers_at("B", bits, bits, first_last="excluded")
    assert float(bops(excluded)) / 1e9 == pytest.approx(inner, abs=5.1e-5)
    assert size_bits(layers) == size
    if average is not None:
        assert float(average_weight_bits(layers)) == pytest.approx(average, abs=5.1e-5)


@pytest.mark.parametrize(
    ("bits", "first_last", "giga"),
    [(32, "all", 44.4458), (8, "all", 3.5703), (4, "fixed8", 1.3243), (4, "all", 1.2995), (2, "fixed8", 0.6826)],
)
def test_uniq_form(bits, first_last, giga):
    assert float(bops(layers_at("A", bits, bits, first_last=first_last), "uniq")) / 1e9 == pytest.approx(
        giga, abs=5.1e-5
    )


@pytest.mark.parametrize(("bits", "giga"), [(4, 0.6559), (2, 0.1675)])
def test_eight_bit_image(bits, giga):
    assert float(bops(layers_at("A", bits, bits, input_bits=8))) / 1e9 == pytest.approx(giga, abs=5.1e-5)


def test_float_first_layer_reads_a_float_image():
    assert bops(layers_at("A", 2, 2, first_last="fp", input_bits=8)) == bops(layers_at("A", 2, 2, first_last="fp"))


def mixed_recipe() -> Recipe:
    stages = {"layer1": 4, "layer2": 3, "layer3": 2}
    rules = [{"match": f"{name}.*", "weight": {"bits": bits}} for name, bits in stages.items()]
    ends = [{"match": end, "weight": {"bits": 8}, "input": {"bits": 8}} for end in ("@first", "@last")]
    slot = {"name": "lsq", "bits": 4}
    return Recipe.from_config({"weight": slot, "input": slot, "rules": [*rules, *ends]})


def test_mixed_example_from_a_converted_net():
    net = resnet20()
    convert(net, mixed_recipe(), "conv1", "fc")
    report = cost_report(net, IMAGE, "conv1", "fc")
    assert report["bops"] == 514367488
    assert report["size_bits"] == 621440
    assert report["size_mb"] == pytest.approx(0.077680)
    assert report["weight_bits"] == pytest.approx(2.3159, abs=5e-5)
    assert report["compression"] == pytest.approx(13.8175, abs=5e-5)
    assert report["weight_bits_layer_mean"] == pytest.approx((8 + 6 * 4 + 6 * 3 + 6 * 2 + 8) / 20)
    assert report["activation_bits"] == pytest.approx((187456 * 4 + (3072 + 64) * 4) / 187456)
    assert report["convention"]["first_last"] == "all"
    assert "first_last=all" in format_cost(report) and "once for each layer that reads it" in format_cost(report)


def test_report_counts_biases_norms_and_scales():
    net = resnet20()
    slot = {"name": "lsq", "bits": 2, "granularity": "channel"}
    convert(net, Recipe(weight=slot), "conv1", "fc")
    report = cost_report(net, IMAGE, "conv1", "fc", CostConvention(count_ranges=True))
    assert report["size_bits"] == 536672 + 22336
    assert report["size_bits_all"] == 536672 + 22336 + 32 * (10 + 2 * 688)


def test_of_batchnorms_with_a_copy_for_each_width_one_counts():
    slot = {"name": "lsq", "bits": 4}
    net = resnet20()
    convert(net, Recipe.from_config({"weight": slot, "input": slot, "widths": [2, 4]}), "conv1", "fc")
    assert count_norm_parameters(net) == count_norm_parameters(resnet20()) == 2 * 688


def test_peak_memory():
    net, image = resnet20(), 16384
    # the second convolution of a block: its input, its output and the block's input, which the add still needs
    assert cost_report(net, IMAGE, "conv1", "fc")["activation_peak_bits"] == 3 * image * 32
    slot = {"name": "lsq", "bits": 4}
    convert(net, Recipe(weight=slot, input=slot), "conv1", "fc")
    assert cost_report(net, IMAGE, "conv1", "fc")["activation_peak_bits"] == 3 * image * 4
    with passes(net, bits={"layer1.0.conv2.input_quantizer": 8}):
        assert cost_report(net, IMAGE, "conv1", "fc")["activation_peak_bits"] == (8 + 4 + 4) * image
    assert (
        cost_report(net, IMAGE, "conv1", "fc", CostConvention(first_last="excluded"))["activation_peak_bits"]
        == 12 * image
    )
    net = resnet20()
    outputs = [{"match": r"layer1\.0\.add", "quantizer": {"name": "lsq", "bits": 8}}]
    convert(net, Recipe.from_config({"weight": slot, "input": slot, "outputs": outputs}), "conv1", "fc")
    # both operands of the add with an 8-bit output are kept at 8 bits
    assert cost_report(net, IMAGE, "conv1", "fc")["activation_peak_bits"] == (8 + 8 + 4) * image


def test_peak_memory_needs_modules():
    class Functional(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(x + 1)

    with pytest.raises(ValueError, match="what fc reads comes from no module"):
        cost_report(Functional(), (4,), "fc", "fc")


def test_measuring_moves_nothing():
    net = resnet20()
    convert(net, mixed_recipe(), "conv1", "fc")
    net.train()
    net.layer1[0].bn1.eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    measure(net, IMAGE)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert net.training and net.conv1.training and not net.layer1[0].bn1.training
    assert not net.conv1._forward_hooks


def test_zero_bits_and_bits_per_channel():
    (layer,) = (layer for layer in float_layers("A") if layer.name == "layer1.0.conv1")
    pruned = replace(layer, weight_bits=torch.tensor(0.0), input_bits=torch.tensor(4.0))
    assert bops([pruned]) == bops([pruned], "uniq") == size_bits([pruned]) == 0
    half = replace(pruned, weight_bits=torch.tensor([0.0, 4.0] * 8))
    full = replace(pruned, weight_bits=torch.tensor(4.0))
    for form in ("product", "uniq"):
        assert bops([half], form) == bops([full], form) / 2
    assert size_bits([half]) == size_bits([full]) / 2
    convention, ends = CostConvention(count_sign_bit=True), (float_layers("A")[0], float_layers("A")[-1])
    signed = apply_convention([half, *ends], convention, "conv1", "fc")
    assert torch.equal(signed[0].weight_bits, torch.tensor([0.0, 5.0] * 8))
    assert torch.equal(signed[1].weight_bits, torch.tensor(32.0))


def test_gradient_of_expected_bits():
    choices = torch.tensor([2.0, 4.0, 8.0], dtype=torch.float64)
    logits = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    probabilities = logits.softmax(0)
    expected = (probabilities * choices).sum()
    (layer,) = (layer for layer in float_layers("A") if layer.name == "layer3.1.conv2")
    layer = replace(layer, weight_bits=expected, input_bits=torch.tensor(3.0))
    rule = (probabilities * (choices - expected)).detach()
    for cost, factor in ((bops([layer]), layer.macs * 3), (size_bits([layer]), layer.weights)):
        (gradient,) = torch.autograd.grad(cost, logits, retain_graph=True)
        torch.testing.assert_close(gradient, factor * rule, rtol=1e-12, atol=0)
        assert abs(float(gradient.sum())) < 1e-9 * factor


def test_measure_reads_expected_bits():
    net = resnet20()
    convert(net, mixed_recipe(), "conv1", "fc")
    soft = torch.tensor(2.5, requires_grad=True)

    class Soft(type(net.layer1[0].conv1.weight_quantizer)):
        @property
        def expected_bits(self):
            return soft

    net.layer1[0].conv1.weight_quantizer.__class__ = Soft
    hard, expected = measure(net, IMAGE), measure(net, IMAGE, expected=True)
    assert size_bits(hard) == 621440
    difference = size_bits(hard) - size_bits(expected)
    assert difference == 2304 * 1.5
    (gradient,) = torch.autograd.grad(size_bits(expected), soft)
    assert gradient == 2304


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"first_last": "none"}, "cost.first_last=none"),
        ({"shortcut": "fp"}, "cost.shortcut=fp"),
        ({"form": "hawq"}, "cost.form=hawq"),
        ({"input_bits": 33}, "cost.input_bits=33"),
        ({"shortcut_names": "("}, "cost.shortcut_names="),
    ],
)
def test_bad_convention(options, key):
    with pytest.raises(ValueError, match=key):
        CostConvention(**options)


def test_bad_arguments():
    layers = float_layers("A")
    with pytest.raises(ValueError, match="'stem' is no convolution"):
        apply_convention(layers, CostConvention(), "stem", "fc")
    with pytest.raises(ValueError, match="cost.form=hawq"):
        bops(layers, "hawq")
    with pytest.raises(ValueError, match="use sum or max"):
        input_memory(layers, "peak")
    assert average_activation_bits(layers) == 32


def test_a_net_of_two_layers_has_no_inner_ones():
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    report = cost_report(net, (4,), "0", "2")
    assert report["bops_inner"] == 0 and report["bops"] == (12 + 6) * 1024
    assert report["activation_max_bits"] == 4 * 32 and report["activation_peak_bits"] == 7 * 32
