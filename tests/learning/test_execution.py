"""How a run's network is run: what `compile` means for it, and which form its quantizers then take."""

from __future__ import annotations

import pytest
import torch

from analysis.train_config import train_config
from research.config import build_module
from research.learning.double_backward import twice_differentiable
from research.learning.execution import PAYS_BACK, choose_execution, execute_as
from research.learning.mechanic import Mechanic
from research.models.structure import FloatModel
from research.quant.calibrate import calibrate
from research.quant.layers import quantizers
from research.quant.rectified import LeftOutReLU
from tests.learning.tiny import SIDE, make_module


class Curved(Mechanic):
    """Takes second derivatives."""

    slug = "curved"
    needs_double_backward = True


LONG, MIDDLE, SHORT = PAYS_BACK["network"], PAYS_BACK["quantizers"], PAYS_BACK["quantizers"] - 1


@pytest.mark.parametrize(
    ("compile_", "steps", "mechanics", "compiler", "expected"),
    [
        ("auto", LONG, [], True, "network"),
        ("auto", LONG - 1, [], True, "quantizers"),
        ("auto", MIDDLE, [], True, "quantizers"),
        ("auto", SHORT, [], True, "none"),
        ("auto", LONG, [Curved()], True, "none"),
        ("auto", LONG, [], False, "none"),
        ("network", 1, [], False, "network"),
        ("quantizers", 1, [Curved()], True, "quantizers"),
        ("none", LONG, [], True, "none"),
    ],
)
def test_auto_compiles_what_pays_back_and_anything_else_is_done(
    compile_: str, steps: int, mechanics: list[Mechanic], compiler: bool, expected: str
) -> None:
    assert choose_execution(compile_, steps, mechanics, compiler) == expected


def kernels(net: FloatModel) -> set[str | None]:
    return {quantizer.kernels for _, quantizer in quantizers(net)}


def test_the_whole_network_is_compiled_in_the_traced_form_whatever_it_was_before() -> None:
    net = make_module().net
    assert execute_as(net, "none", ()) == "execution: eager, fused quantizers" and kernels(net) == {"eager"}
    assert execute_as(net, "quantizers", ()).endswith("compiled") and kernels(net) == {"compiled"}
    execute_as(net, "network", ())
    assert kernels(net) == {"traced"}


def test_relus_are_left_to_the_quantizers_unless_the_network_is_compiled_as_a_whole() -> None:
    net = build_module(train_config(["model=resnet8", "quantizer=lsq"])).net
    execute_as(net, "network", ())
    assert not any(isinstance(module.forward, LeftOutReLU) for module in net.modules())
    execute_as(net, "none", ())
    left_out = {name for name, module in net.named_modules() if isinstance(module.forward, LeftOutReLU)}
    assert left_out == {f"layer{stage}.0.relu1" for stage in (1, 2, 3)}


def test_second_derivatives_are_right_inside_the_block_only() -> None:
    net = make_module().net
    line = execute_as(net, "none", [Curved()])
    assert line.endswith("; twice differentiable where callbacks.curved asks for it")
    weight = next(parameter for parameter in net.parameters() if parameter.ndim == 4)
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    calibrate(net, [images])
    with twice_differentiable(net):
        assert kernels(net) == {"affine"}
        loss = net(images).square().sum()
    assert kernels(net) == {"eager"}
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), weight)[0].abs().sum() > 0
    with pytest.raises(RuntimeError, match="evaluate inside research.learning.double_backward.twice_differentiable"):
        torch.autograd.grad(net(images).square().sum(), weight, create_graph=True)
