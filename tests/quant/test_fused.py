"""The fast path equals the reference: values bit for bit, gradients to rounding, in eager and compiled form."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from research.quant.compiler import FlatKernel
from research.quant.fused import Kernels
from research.quant.kernels import BLOCK, compiled_backward, compiled_quantize
from research.quant.layers import QuantConv2d
from research.quant.passes import passes, surrogate_gradients, use_kernels
from research.quant.quantizers import QuantizerSpec
from research.quant.quantizers.lsq import LSQ

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
SHAPES = {"small": (2, 3, 5, 5), "blocks": (3, 8, 40, 60), "vector": (7,)}


def quantizer(bits: int = 4, signed: bool = False, **options: object) -> LSQ:
    made = LSQ(QuantizerSpec("lsq", bits, signed), (), None, "input", **options)  # type: ignore[arg-type]
    made.raw_scale.data.fill_(0.13)
    return made


def values(shape: tuple[int, ...], dtype: torch.dtype, signed: bool) -> Tensor:
    """Numbers inside, outside and exactly on bounds and ties."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    x = x if signed else x.relu()
    flat = x.view(-1)
    flat[: min(4, flat.numel())] = torch.tensor([0.0, 15 * 0.13, 0.065, 0.195][: flat.numel()], dtype=dtype)
    return x.requires_grad_()


def results(q: LSQ, x: Tensor) -> tuple[Tensor, ...]:
    y = q(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return y, *torch.autograd.grad(y, (x, q.raw_scale), upstream.to(y.dtype))


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.dtype == expected.dtype
    assert float((found - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("kernels", ["eager", "traced", "affine", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_the_quantizer_equals_the_reference(kernels: Kernels, dtype: torch.dtype, signed: bool) -> None:
    for shape in SHAPES.values():
        for bits in (2, 4, 8):
            q = quantizer(bits, signed).to(dtype)
            x = values(shape, dtype, signed)
            reference = results(q, x)
            q.kernels = kernels
            found = results(q, x)
            assert torch.equal(found[0], reference[0])
            assert_near(found[1], reference[1], TOLERANCE[dtype])
            grid = q.fused_grid(x)
            assert grid is not None
            terms = float(reference[0].numel() * grid.gradient_factor)  # a sum is as exact as its terms are large
            assert float((found[2] - reference[2]).abs()) <= TOLERANCE[dtype] * max(1.0, terms)


def test_several_blocks_are_covered() -> None:
    assert torch.Size(SHAPES["blocks"]).numel() > BLOCK > 0 and torch.Size(SHAPES["blocks"]).numel() % BLOCK


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded upstream"])
def test_any_memory_layout(layout: str) -> None:
    q = quantizer()
    x = values((4, 6, 10, 10), torch.float32, False).detach()
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        x = x[:, ::2, 1:]
    x = x.requires_grad_()

    def gradients() -> tuple[Tensor, ...]:
        y = q(x)
        upstream = torch.linspace(-1, 1, y.shape[-1]).expand(y.shape)
        return y, *torch.autograd.grad(y, (x, q.raw_scale), upstream)

    reference = gradients()
    q.kernels = "eager"
    found = gradients()
    assert torch.equal(found[0], reference[0])
    assert_near(found[1], reference[1], 1e-6)
    assert_near(found[2], reference[2], 1e-6)


def convolution(stride: int = 1, groups: int = 1, bias: bool = False) -> QuantConv2d:
    torch.manual_seed(0)
    layer = QuantConv2d(nn.Conv2d(4, 8, 3, stride=stride, padding=1, groups=groups, bias=bias))
    layer.input_quantizer = quantizer()
    layer.weight_quantizer = LSQ(QuantizerSpec("lsq", 3, True), layer.weight.shape, None, "weight")
    layer.weight_quantizer.initialise(layer.weight)
    return layer


def layer_results(layer: nn.Module, x: Tensor) -> list[Tensor]:
    y = layer(x)
    return [y, *torch.autograd.grad(y.square().mean(), (x, *layer.parameters()))]


@pytest.mark.parametrize("kernels", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", [(3, 4, 9, 9), (3, 4, 60, 60)], ids=["short", "blocks"])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"groups": 2, "bias": True}], ids=["plain", "stride", "groups"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_fused_convolution_equals_the_reference(
    options: dict[str, int], dtype: torch.dtype, shape: tuple[int, ...], kernels: Kernels
) -> None:
    layer = convolution(**options).to(dtype)  # type: ignore[arg-type]
    x = values(shape, dtype, False)
    reference = layer_results(layer, x)
    use_kernels(layer, kernels)
    found = layer_results(layer, x)
    assert torch.equal(found[0], reference[0])
    for one, other in zip(found[1:], reference[1:], strict=True):
        assert_near(one, other, TOLERANCE[dtype])


@pytest.mark.parametrize("learned", ["weight", "bias", "input"])
def test_the_fused_convolution_has_the_gradients_that_are_asked_for(learned: str) -> None:
    layer = convolution(bias=True)
    layer.requires_grad_(False)
    x = values((3, 4, 9, 9), torch.float32, False)
    of = x if learned == "input" else getattr(layer, learned).requires_grad_()
    x.requires_grad_(learned == "input")
    (reference,) = torch.autograd.grad(layer(x).square().mean(), of)
    use_kernels(layer, "eager")
    assert_near(torch.autograd.grad(layer(x).square().mean(), of)[0], reference, TOLERANCE[torch.float32])


def test_under_autocast_the_convolution_runs_in_bfloat16() -> None:
    layer = convolution()
    x = values((3, 4, 9, 9), torch.float32, False)
    with torch.autocast("cpu", torch.bfloat16):
        reference = layer_results(layer, x)
        use_kernels(layer, "eager")
        found = layer_results(layer, x)
    assert found[0].dtype == torch.bfloat16 and torch.equal(found[0], reference[0])
    for one, other in zip(found[1:], reference[1:], strict=True):
        assert_near(one, other, 1e-2)  # the reference rounds the gradient to bfloat16 once more


def test_only_the_input_is_kept() -> None:
    """Nothing of the input's size is saved but the input itself, and that once."""
    layer = convolution()
    use_kernels(layer, "eager")
    x = values((8, 4, 16, 16), torch.float32, False)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    large = [tensor for tensor in kept if tensor.numel() >= x.numel()]
    assert [tensor.data_ptr() for tensor in large] == [x.data_ptr()]


def test_second_derivatives_are_refused_and_the_reference_has_them() -> None:
    layer = convolution().double()
    use_kernels(layer, "eager")
    x = values((2, 4, 6, 6), torch.float64, False)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(layer(x).square().sum(), layer.weight, create_graph=True)
    with surrogate_gradients(layer):
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), layer.weight, create_graph=True)
        assert torch.autograd.grad(gradient.square().sum(), layer.weight)[0].abs().sum() > 0


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_the_affine_kernels_have_the_derivatives_of_the_reference_of_any_order(signed: bool) -> None:
    q = quantizer(signed=signed).double()
    x = values((3, 4, 5), torch.float64, signed)

    def derivatives() -> list[Tensor]:
        variables = (x, q.raw_scale)
        found = [(q(x * x.cos()) * torch.linspace(1, 2, 5)).pow(4).sum()]
        for _ in range(3):
            total = sum(term.square().sum() for term in found[-1:])
            found += torch.autograd.grad(total, variables, create_graph=True)
        return [term.detach() for term in found]

    expected = derivatives()
    q.kernels = "affine"
    for found, reference in zip(derivatives(), expected, strict=True):
        assert_near(found, reference, 1e-12 * max(1.0, float(reference.abs().max())))


def test_what_the_fast_path_does_not_know_takes_the_reference() -> None:
    layer = convolution()
    x = values((2, 4, 6, 6), torch.float32, False)
    use_kernels(layer, "eager")
    q = layer.input_quantizer
    assert isinstance(q, LSQ) and q.fused_grid(x) is not None
    with passes(layer, mode="relax"):
        assert q.fused_grid(x) is None
    assert quantizer(mask="round_first").fused_grid(x) is None
    channel = LSQ(QuantizerSpec("lsq", 4, True, granularity="channel"), (8, 4, 3, 3), 0, "weight")
    assert channel.fused_grid(layer.weight) is None
    seen: list[Tensor] = []
    q.register_forward_hook(lambda module, inputs, output: seen.append(output))
    layer(x)
    assert len(seen) == 1, "a hook on the quantizer still sees its output"


def test_compiled_kernels_are_one_graph_each_whatever_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, bool]] = []

    def counted(kernel: FlatKernel, arguments: tuple[Tensor, ...]) -> Callable[..., Any]:
        made.append((kernel.function.__name__, arguments[0].numel() <= BLOCK))
        return kernel.function

    monkeypatch.setattr(FlatKernel, "_make", counted)
    for kernel in (compiled_quantize, compiled_backward):
        monkeypatch.setattr(kernel, "_made", {})
    for training in (True, False):
        for bits in (2, 4, 8):
            q = quantizer(bits, True).requires_grad_(training)
            q.kernels = "compiled"
            for shape in ((8, 3, 64, 64), (500, 16, 16), (600, 100), (40, 16, 9, 9), (3, 5), (7, 4, 3, 3)):
                for layout in (torch.contiguous_format, torch.channels_last):
                    if layout == torch.channels_last and len(shape) != 4:
                        continue
                    x = values(shape, torch.float32, True).detach().contiguous(memory_format=layout)
                    y = q(x.requires_grad_(training))
                    if training:
                        (y * y.detach()).sum().backward()
                    with torch.no_grad():
                        q((2 * x)[1:])
    names = ("quantize", "quantize_backward")
    assert sorted(made) == sorted((name, short) for name in names for short in (True, False))
