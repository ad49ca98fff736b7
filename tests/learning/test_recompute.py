"""Recomputed activations: the same gradients bit for bit from less memory, whatever is quantized or differentiated."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from research.learning.recompute import recomputed_activations
from research.models import resnet8
from research.quant.calibrate import calibrate
from research.quant.convert import convert
from research.quant.passes import use_kernels
from research.quant.recipe import Recipe
from tests.learning.tiny import LSQ, fit, make_data, make_module


def network(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net, x = resnet8(width=8), torch.randn(16, 3, 16, 16)
    if kind != "float":
        structure = net.structure()
        convert(net, Recipe.from_config(LSQ), structure.first, structure.last)
        calibrate(net, [x])
        use_kernels(net, "eager" if kind == "fused" else None)
    return net.train(), x


def gradients(kind: str, recompute: bool, autocast: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    net, x = network(kind)
    keeping = recomputed_activations(net) if recompute else contextlib.nullcontext()
    with keeping, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = net(x).float().square().mean()
    return list(torch.autograd.grad(loss, list(net.parameters()))), list(net.buffers())


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["float", "reference", "fused"])
def test_gradients_and_statistics_are_the_same_bits(kind: str, autocast: bool) -> None:
    for kept, made in zip(gradients(kind, False, autocast), gradients(kind, True, autocast), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(kept, made, strict=True))


def saved_bytes(kind: str, recompute: bool) -> int:
    net, x = network(kind)
    own = {parameter.data_ptr() for parameter in net.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    if not recompute:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(x)
        return sum(kept.values())
    with recomputed_activations(net) as recorder:
        y = net(x)
        total = recorder.saved_bytes(own)
    del y
    return total


def test_the_fused_network_keeps_three_quarters_of_what_the_float_one_keeps() -> None:
    float_bytes = saved_bytes("float", recompute=False)
    assert saved_bytes("reference", recompute=False) > 2 * float_bytes
    assert saved_bytes("fused", recompute=False) < 1.1 * float_bytes
    assert saved_bytes("fused", recompute=True) < 0.8 * float_bytes


def test_second_derivatives_are_the_same() -> None:
    found = []
    for recompute in (False, True):
        net, x = network("reference")
        weights = [p for p in net.parameters() if p.ndim == 4]
        with recomputed_activations(net) if recompute else contextlib.nullcontext():
            loss = net(x).square().mean()
            first = torch.autograd.grad(loss, weights, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), weights))  # type: ignore[arg-type]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_an_evaluation_and_a_graph_used_twice_work() -> None:
    net, x = network("float")
    with recomputed_activations(net):
        loss = net(x).square().mean()
    weights = list(net.parameters())
    once, twice = (torch.autograd.grad(loss, weights, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(once, twice, strict=True))
    net.eval()
    with torch.no_grad(), recomputed_activations(net):
        inside = net(x)
    with torch.no_grad():
        assert torch.equal(inside, net(x))


def test_a_run_is_the_same_bits_with_it(tmp_path: Any) -> None:
    runs = []
    for recompute in (False, True):
        module = make_module(recompute=recompute)
        fit(module, make_data(), folder=tmp_path / str(recompute))
        runs.append(module.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_compiled_network_refuses_it() -> None:
    with pytest.raises(ValueError, match="^recompute=true: .*compile=network"):
        make_module(recompute=True, compile="network")
