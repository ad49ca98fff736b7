"""A ReLU in front of a quantizer that clips at zero is left out in training, and nobody can tell."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from research.quant.fused import Kernels
from research.quant.layers import QuantConv2d
from research.quant.passes import surrogate_gradients, use_kernels
from research.quant.quantizers import QuantizerSpec
from research.quant.quantizers.lsq import LSQ
from research.quant.rectified import LeftOutReLU, leave_out_relus

SHORT, BLOCKS = (2, 4, 9, 9), (3, 4, 80, 90)


class Net(nn.Module):
    """norm - ReLU - quantized convolution; the norm's last channel is exactly zero everywhere."""

    def __init__(self, signed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU()
        self.conv = QuantConv2d(nn.Conv2d(4, 5, 3, padding=1))
        self.conv.input_quantizer = LSQ(QuantizerSpec("lsq", 3, signed), (), None, "input")
        self.conv.input_quantizer.raw_scale.data.fill_(0.2)
        nn.init.zeros_(self.norm.weight[-1:])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.relu(self.norm(x)))
        return y


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each time that a ReLU was computed."""
    made: list[bool] = []
    forward = nn.ReLU.forward

    def counted(self: nn.ReLU, x: Tensor) -> Tensor:
        made.append(True)
        return forward(self, x)

    monkeypatch.setattr(nn.ReLU, "forward", counted)
    return made


def left_out(kernels: Kernels | None = "eager", signed: bool = False) -> Net:
    net = Net(signed)
    use_kernels(net, kernels)
    leave_out_relus(net, [("relu", "conv")])
    return net


def results(net: Net, x: Tensor) -> list[Tensor]:
    y = net(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad(y, (x, *net.parameters()), upstream)]


def images(shape: tuple[int, ...] = SHORT, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


@pytest.mark.parametrize("kernels", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", [SHORT, BLOCKS], ids=["short", "blocks"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
def test_values_and_gradients_are_those_of_the_reference(
    kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, calls: list[bool]
) -> None:
    expected = results(Net().to(dtype), images(shape, dtype))
    assert len(calls) == 1
    found = results(left_out(kernels).to(dtype), images(shape, dtype))
    assert len(calls) == 1, "the ReLU was left out"
    assert torch.equal(found[0], expected[0])
    elements = images(shape).numel()
    terms = (elements / 7) ** 0.5  # of the scale's gradient with its factor: a sum is as exact as its terms are many
    for one, other, size in zip(found[1:], expected[1:], [1.0] * 5 + [terms], strict=True):
        assert float((one - other).abs().max()) <= tolerance * max(size, float(other.abs().max()))
    assert float(found[3][-1]) == 0.0, "zeros get no gradient: the bias of the channel that is zero everywhere"


def test_it_is_bit_for_bit_the_fast_path_with_the_relu() -> None:
    plain = Net()
    use_kernels(plain, "eager")
    for one, other in zip(results(left_out(), images(BLOCKS)), results(plain, images(BLOCKS)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kernels", [None, "traced", "affine"])
def test_other_forms_have_the_relu(kernels: Kernels | None, calls: list[bool]) -> None:
    results(left_out(kernels), images())
    assert len(calls) == 1


def test_a_signed_quantizer_has_the_relu_and_its_lowest_code_its_gradient(calls: list[bool]) -> None:
    expected = results(Net(signed=True), images())
    found = results(left_out(signed=True), images())
    assert len(calls) == 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    quantizer = left_out(signed=True).conv.input_quantizer
    assert quantizer is not None
    x = torch.tensor([-4 * 0.2, 0.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(quantizer(x).sum(), x)
    assert gradient.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("place", ["relu", "conv", "conv.input_quantizer"])
@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
def test_whoever_looks_sees_the_rectified_tensor(place: str, before: bool) -> None:
    net = left_out()
    seen: list[Tensor] = []
    module = net.get_submodule(place)
    if before:
        if place == "relu":
            pytest.skip("in front of the ReLU there is nothing to see")
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    else:
        module.register_forward_hook(lambda _, inputs, output: seen.extend([output if place == "relu" else inputs[0]]))
    net(images())
    assert len(seen) == 1 and float(seen[0].detach().min()) == 0.0


def test_evaluation_and_passes_without_gradients_have_the_relu(calls: list[bool]) -> None:
    net = left_out()
    with torch.no_grad():
        net(images())
    net.eval()
    net(images())
    assert len(calls) == 2


def test_second_derivatives_are_taken_with_the_relu(calls: list[bool]) -> None:
    net = left_out()
    with surrogate_gradients(net):
        net(images())
    assert len(calls) == 1


def test_other_modes_and_other_activations_are_as_they_were(calls: list[bool]) -> None:
    net = left_out()
    assert net.conv.input_quantizer is not None
    net.conv.input_quantizer.mode = "identity"
    net(images())
    assert len(calls) == 1
    other = Net()
    other.relu = nn.ReLU6()  # type: ignore[assignment]
    leave_out_relus(other, [("relu", "conv")])
    assert "forward" not in vars(other.relu)


def test_a_copy_asks_its_own_quantizer(calls: list[bool]) -> None:
    net = left_out()
    twin = copy.deepcopy(net)
    assert isinstance(twin.relu.forward, LeftOutReLU) and twin.relu.forward.layer is twin.conv
    use_kernels(twin, None)
    net(images())
    assert not calls
    twin(images())
    assert len(calls) == 1
    assert net.state_dict().keys() == Net().state_dict().keys()
