import pytest
import torch
from torch import nn

from research.quant.batchnorm import fold_batchnorm, fold_pairs, reestimate_batchnorm
from research.quant.convert import convert
from research.quant.passes import passes
from research.quant.recipe import Recipe


def small_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5)
    )
    for norm in (net[1], net[4]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return net


def images(count: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(6, 3, 8, 8) for _ in range(count)]


def test_fold_batchnorm_formula():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 5, 5).double(), torch.randn(4, 3, 3, 3).double(), torch.randn(4).double()
    gamma, beta, mean = torch.randn(3, 4).double()
    var = torch.rand(4).double() + 0.1
    for b in (bias, None):
        folded_weight, folded_bias = fold_batchnorm(weight, b, gamma, beta, mean, var, 1e-5)
        expected = nn.functional.batch_norm(nn.functional.conv2d(x, weight, b), mean, var, gamma, beta, False, eps=1e-5)
        torch.testing.assert_close(nn.functional.conv2d(x, folded_weight, folded_bias), expected, rtol=0, atol=1e-12)


def test_fold_pairs_keeps_the_function():
    net, (x, *_) = small_net().eval(), images()
    expected = net(x)
    fold_pairs(net, [("0", "1"), ("3", "4")])
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)
    assert type(net[1]) is nn.Identity and net[3].bias is not None
    with pytest.raises(ValueError, match="quantizer.fold_bn: 0 and 1 are Conv2d and Identity"):
        fold_pairs(net, [("0", "1")])


def test_average_over_the_batches():
    net, batches = small_net(), images()
    net.train()
    net[4].eval()
    counter = net[1].num_batches_tracked.clone()
    y = [net[0](x) for x in batches]
    assert reestimate_batchnorm(net, batches) == 2
    mean = torch.stack([part.mean((0, 2, 3)) for part in y]).mean(0)
    var = torch.stack([part.var((0, 2, 3)) for part in y]).mean(0)
    torch.testing.assert_close(net[1].running_mean, mean)
    torch.testing.assert_close(net[1].running_var, var)
    assert net[1].momentum == 0.1 and torch.equal(net[1].num_batches_tracked, counter)
    assert net[1].training and not net[4].training


def test_momentum_moves_from_where_it_is():
    net, batches = small_net(), images(1)
    before = net[1].running_mean.clone()
    reestimate_batchnorm(net, batches, momentum=0.25)
    expected = 0.75 * before + 0.25 * net[0](batches[0]).mean((0, 2, 3))
    torch.testing.assert_close(net[1].running_mean, expected)


def test_statistics_are_those_of_the_quantized_net_and_nothing_else_moves():
    net, batches = small_net(), images()
    convert(net, Recipe(weight={"name": "lsq", "bits": 2}), "0", "3")
    net[0].weight_quantizer.initialise(net[0].weight)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with passes(net, mode="identity"):
        reestimate_batchnorm(net, batches)
    mean = torch.stack([net[0](x).mean((0, 2, 3)) for x in batches]).mean(0)
    torch.testing.assert_close(net[1].running_mean, mean)
    moved = {key for key, value in net.state_dict().items() if not torch.equal(before[key], value)}
    assert moved == {f"{norm}.running_{what}" for norm in (1, 4) for what in ("mean", "var")}


def test_only_the_selected_width_is_reestimated():
    net, batches = small_net(), images()
    slot = {"name": "lsq", "bits": 4}
    convert(net, Recipe(weight=slot, widths=(2, 4)), "0", "3")
    before = net[1].by_width["4"].running_mean.clone()
    with passes(net, bits=2, batchnorm=2):
        assert reestimate_batchnorm(net, batches) == 2
    assert torch.equal(net[1].by_width["4"].running_mean, before)
    assert not torch.equal(net[1].by_width["2"].running_mean, before)


def test_no_norms_and_no_batches():
    assert reestimate_batchnorm(nn.Linear(2, 2), [torch.zeros(1, 2)]) == 0
    net = small_net()
    with pytest.raises(ValueError, match="no batches"):
        reestimate_batchnorm(net, [])
    assert net[1].momentum == 0.1 and net.training
