"""Strategies of folding: golden vectors, equality without quantizers, what moves in training."""

import copy

import pytest
import torch
from torch import nn

from research.models import resnet8
from research.quant.batchnorm import fold_batchnorm, reestimate_batchnorm
from research.quant.calibrate import calibrate
from research.quant.conv_bn import QuantConvBn2d, fold_into_quant, freeze_batchnorm, merge_batchnorm
from research.quant.convert import convert
from research.quant.layers import quant_layers
from research.quant.passes import passes, weight_leaves
from research.quant.quantizers import QuantizerSpec, build_quantizer
from research.quant.recipe import Recipe

PAIR = [("0", "1")]
MINMAX4 = {
    "name": "minmax", "bits": 4, "granularity": "channel", "init": "minmax", "options": {"mask": "round_first"}
}  # fmt: skip


def conv_and_norm(seed: int = 0, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=bias), nn.BatchNorm2d(6))
    nn.init.uniform_(net[1].weight, 0.5, 1.5)
    nn.init.normal_(net[1].bias)
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    return net


def folded(net: nn.Sequential, strategy: int, weight: dict | None = None) -> nn.Sequential:
    net = copy.deepcopy(net)
    convert(net, Recipe(weight=weight, fold_bn=strategy), "0", "0", conv_bn=PAIR)
    return net


@pytest.mark.parametrize("case", ["frozen", "train"])
def test_golden_strategy_4(golden, case):
    arrays = {key: torch.from_numpy(value) for key, value in golden("mqbench").items() if key.startswith(("fold", "w"))}
    net = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
    net.load_state_dict(
        {
            "0.weight": arrays["w"],
            "1.weight": arrays["fold_gamma"],
            "1.bias": arrays["fold_beta"],
            "1.running_mean": arrays["fold_rmean"],
            "1.running_var": arrays["fold_rvar"],
            "1.num_batches_tracked": torch.tensor(0),
        }
    )
    net = folded(net, 4, MINMAX4)
    calibrate(net, [])
    if case == "frozen":
        freeze_batchnorm(net)
    net.train()
    y = net(arrays["fold_x"])
    y.backward(arrays["fold_gy"])
    found = {
        "y": y.detach(),
        "gw": net[0].weight.grad,
        "ggamma": net[1].weight.grad,
        "rmean_after": net[1].running_mean,
        "rvar_after": net[1].running_var,
    }
    for key, value in found.items():
        torch.testing.assert_close(
            value, arrays[f"fold4_{case}_{key}"], rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strategy", [0, 1, 2, 3, 4])
def test_same_function_without_quantizers(strategy, bias):
    net, x = conv_and_norm(bias=bias), torch.randn(5, 4, 6, 6)
    expected = net.eval()(x)
    torch.testing.assert_close(folded(net, strategy).eval()(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strategy", [2, 3, 4])
def test_training_is_ordinary_batchnorm_without_quantizers(strategy, bias):
    net, x = conv_and_norm(bias=bias).double(), torch.randn(5, 4, 6, 6).double()
    ours = folded(net, strategy)
    target = torch.randn(5, 6, 6, 6).double()
    for module in (net, ours):
        (module.train()(x) * target).sum().backward()
    torch.testing.assert_close(ours(x), net(x), rtol=0, atol=1e-10)
    for name in ("0.weight", "1.weight", "1.bias"):
        torch.testing.assert_close(ours.get_parameter(name).grad, net.get_parameter(name).grad, rtol=0, atol=1e-10)
    for key, value in net.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=0, atol=1e-10)


@pytest.mark.parametrize("strategy", [2, 3])
def test_strategies_2_and_3_quantized(strategy):
    net, x = conv_and_norm(), torch.randn(5, 4, 6, 6)
    ours = folded(net, strategy, MINMAX4)
    calibrate(ours, [])
    conv, norm = net[0], net[1]
    y = conv(x)
    mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
    statistics = (mean, var) if strategy == 2 else (norm.running_mean, norm.running_var)
    weight, _ = fold_batchnorm(conv.weight, conv.bias, norm.weight, norm.bias, *statistics, norm.eps)
    _, bias = fold_batchnorm(conv.weight, conv.bias, norm.weight, norm.bias, mean, var, norm.eps)
    quantized = nn.functional.conv2d(x, ours[0].weight_quantizer(weight), padding=1)
    if strategy == 3:
        quantized = quantized * torch.sqrt((norm.running_var + norm.eps) / (var + norm.eps)).view(-1, 1, 1)
    torch.testing.assert_close(ours.train()(x), quantized + bias.view(-1, 1, 1), rtol=1e-5, atol=1e-5)


def test_quantizing_and_folding_do_not_commute():
    net = conv_and_norm()
    net[1].weight.data[0] = -net[1].weight.data[0]
    ours = folded(net, 1, {**MINMAX4, "granularity": "tensor"})
    calibrate(ours, [])
    quantizer = build_quantizer(QuantizerSpec("minmax", 4, init="minmax"), net[0].weight.shape, 0, "weight")
    quantizer.initialise(net[0].weight)
    factor = (net[1].weight * torch.rsqrt(net[1].running_var + net[1].eps)).view(-1, 1, 1, 1)
    assert not torch.allclose(ours[0].quantized_weight(), quantizer(net[0].weight) * factor, atol=1e-3)


@pytest.mark.parametrize("strategy", [1, 2, 3, 4])
def test_which_statistics_move(strategy):
    net = folded(conv_and_norm(), strategy, MINMAX4)
    before = net[1].running_mean.clone(), net[1].num_batches_tracked.clone()
    x = torch.randn(5, 4, 6, 6)

    def moved() -> bool:
        return not (torch.equal(net[1].running_mean, before[0]) and torch.equal(net[1].num_batches_tracked, before[1]))

    net.eval()(x)
    freeze_batchnorm(net)
    net.train()(x)
    assert not moved()
    assert not net[1].training and net[0].training
    freeze_batchnorm(net, False)
    net(x)
    assert moved() == (strategy != 1)
    if strategy != 1:
        before = net[1].running_mean.clone(), net[1].num_batches_tracked.clone()
        with passes(net, batchnorm="running"):
            net(x)
        assert not moved()


@pytest.mark.parametrize("strategy", [2, 3, 4])
def test_reestimation_reaches_folded_norms(strategy):
    net = folded(conv_and_norm(), strategy)
    batches = [torch.randn(5, 4, 6, 6) for _ in range(3)]
    expected = torch.stack(
        [nn.functional.conv2d(x, net[0].weight, net[0].bias, padding=1).mean((0, 2, 3)) for x in batches]
    )
    assert reestimate_batchnorm(net, batches) == 1
    torch.testing.assert_close(net[1].running_mean, expected.mean(0), rtol=1e-4, atol=1e-5)
    freeze_batchnorm(net)
    assert reestimate_batchnorm(net, batches) == 0


def test_zero_gamma_stays_finite():
    net = conv_and_norm()
    net[1].weight.data[2] = 0.0
    ours = folded(net, 4, MINMAX4)
    calibrate(ours, [])
    y = ours.train()(torch.randn(5, 4, 6, 6))
    y.square().sum().backward()
    torch.testing.assert_close(y[:, 2], net[1].bias[2].expand_as(y[:, 2]))
    assert torch.isfinite(ours[0].weight.grad).all() and torch.isfinite(ours[1].weight.grad).all()


@pytest.mark.parametrize("strategy", [1, 2, 3, 4])
def test_whole_model_keeps_its_names_and_merges_exactly(strategy):
    torch.manual_seed(0)
    net = resnet8()
    structure = net.structure()
    keys, x = set(net.state_dict()), torch.randn(2, 3, 32, 32)
    slot = {"name": "lsq", "bits": 4}
    recipe = Recipe(weight=slot, input=slot, fold_bn=strategy)
    convert(net, recipe, structure.first, structure.last, conv_bn=structure.conv_bn)
    assert keys <= set(net.state_dict())
    assert sum(isinstance(layer, QuantConvBn2d) for _, layer in quant_layers(net)) == len(structure.conv_bn)
    calibrate(net, [x])
    net.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    twin = copy.deepcopy(net)
    twin.bn1.weight.data.mul_(2)
    doubled = torch.func.functional_call(net.eval(), {"bn1.weight": 2 * net.bn1.weight}, (x,))
    assert torch.equal(doubled, twin.eval()(x))
    assert not torch.equal(twin(x), net(x))  # the copy's convolution refers to the copy's norm
    with weight_leaves(net) as offsets:
        gradients = torch.autograd.grad(net(x).sum(), list(offsets.values()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    expected = net(x)
    merge_batchnorm(net)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    assert torch.equal(net(x), expected)


def test_errors():
    with pytest.raises(ValueError, match="quantizer.fold_bn=5: use none, 0, 1"):
        Recipe.from_config({"fold_bn": 5})
    with pytest.raises(ValueError, match="quantizer.fold_bn=1: quantizer.widths"):
        Recipe.from_config({"fold_bn": 1, "widths": [2, 4]})
    assert Recipe.from_config({"fold_bn": "none"}).fold_bn is None
    with pytest.raises(ValueError, match="quantizer.fold_bn=7: use none"):
        fold_into_quant(conv_and_norm(), PAIR, 7)
    with pytest.raises(ValueError, match="states no .conv, batch-norm. pairs"):
        convert(conv_and_norm(), Recipe(fold_bn=1), "0", "0")
    net = conv_and_norm()
    net[1] = nn.BatchNorm2d(6, affine=False)
    with pytest.raises(ValueError, match="quantizer.fold_bn: 0 and 1 are QuantConv2d and BatchNorm2d"):
        folded(net, 2)
    with pytest.raises(ValueError, match="no folded batch-norm"):
        freeze_batchnorm(conv_and_norm())
