"""LIQ: golden vectors of the official class, its specification's example, and what our options add."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from research.models import resnet20
from research.quant.convert import convert
from research.quant.cost_report import cost_report
from research.quant.quantizers import QuantizerSpec, build_quantizer
from research.quant.quantizers.liq import LIQ, standardise
from research.quant.recipe import Recipe

Golden = Callable[[str], dict[str, np.ndarray]]


def make(bits: int, role: str = "weight", shape: tuple[int, ...] = (3,), **options: object) -> LIQ:
    spec = QuantizerSpec("liq", bits, options=options)
    quantizer = build_quantizer(spec, shape, 0 if role == "weight" else None, role).double()
    assert isinstance(quantizer, LIQ)
    return quantizer


def run(quantizer: LIQ, x: Tensor, upstream: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Output and gradient of `x`; the clip gets its own anew."""
    quantizer.zero_grad()
    x = x.clone().requires_grad_()
    out = quantizer(x)
    (out * upstream).sum().backward()
    return out.detach(), x.grad


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("role", ["weight", "input"])
def test_golden(golden: Golden, role: str, bits: int) -> None:
    prefix = f"liq_{role[0] if role == 'weight' else 'a'}{bits}_"
    case = {k.removeprefix(prefix): torch.from_numpy(v) for k, v in golden("saq").items() if k.startswith(prefix)}
    quantizer = make(bits, role, tuple(case["v"].shape), normalise=False)  # the vectors are standardised already
    quantizer.raw_clip.data.copy_(case["clip"][0])
    out, grad = run(quantizer, case["v"], case["upstream"])
    torch.testing.assert_close(out, case["out"], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(grad, case["grad_v"], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(quantizer.raw_clip.grad, case["grad_clip"][0], rtol=1e-8, atol=1e-12)


def test_the_example_of_the_specification() -> None:  # check 8
    v = torch.tensor([-1.5, -0.2, 0.3, 2.0], dtype=torch.float64)
    quantizer = make(2, shape=(4,), normalise=False)
    out, grad = run(quantizer, v)
    torch.testing.assert_close(out, torch.tensor([-1, -1 / 3, 1 / 3, 1], dtype=torch.float64))
    torch.testing.assert_close(grad, torch.tensor([0.0, 1, 1, 0], dtype=torch.float64))
    assert quantizer.raw_clip.grad.item() == pytest.approx(-0.1, abs=1e-12)
    assert quantizer.codes(v).tolist() == [-3, -1, 1, 3]


def test_the_gradient_of_an_inputs_clip_is_one_above_and_nothing_below() -> None:
    quantizer = make(2, "input")
    run(quantizer, torch.tensor([-5.0, -0.1, 0.0], dtype=torch.float64))
    assert quantizer.raw_clip.grad.item() == 0
    run(quantizer, torch.tensor([1.5, 7.0], dtype=torch.float64))
    assert quantizer.raw_clip.grad.item() == pytest.approx(2)


def test_mean_and_deviation_are_constants_to_the_gradient() -> None:
    w = (3 + 0.1 * torch.randn(4, 3, 3, 3, dtype=torch.float64)).requires_grad_()
    standard = standardise(w)
    torch.testing.assert_close(standard, (w - w.mean()) / w.var(correction=1).sqrt())
    standard.sum().backward()
    torch.testing.assert_close(w.grad, torch.full_like(w, 1 / w.detach().std().item()))


@pytest.mark.parametrize(("shape", "expected"), [((4, 3, 3, 3), True), ((4, 3), False)])
def test_auto_standardises_convolutions_and_leaves_linear_layers(shape: tuple[int, ...], expected: bool) -> None:
    quantizer, w = make(4, shape=shape), 0.01 * torch.randn(shape, dtype=torch.float64)
    quantizer.initialise(w)
    assert quantizer.normalise == expected
    assert quantizer.clip.item() == pytest.approx(1.0 if expected else 0.8 * float(w.abs().max()))
    assert torch.equal(quantizer(5 * w), quantizer(w)) == expected
    explicit = make(4, shape=shape, normalise=expected)
    explicit.initialise(w)
    assert torch.equal(explicit(w), quantizer(w))


def test_a_standardised_weight_keeps_the_promises_of_every_quantizer() -> None:
    for bits in range(1, 9):
        quantizer, w = make(bits, shape=(4, 3, 3, 3)), torch.randn(4, 3, 3, 3, dtype=torch.float64)
        quantizer.initialise(w)
        codes = quantizer.codes(w)
        assert torch.equal(quantizer(w), quantizer.dequantize(codes))
        assert int(codes.abs().max()) <= 2**bits - 1 and bool((codes % 2 == 1).all())
        out, grad = run(quantizer, torch.zeros_like(w))
        assert bool(out.isfinite().all() and grad.isfinite().all())


def test_inputs_start_from_their_data_or_from_the_given_clip() -> None:
    x = torch.tensor([0.0, 2.0, 5.0], dtype=torch.float64)
    free, given = make(4, "input"), make(4, "input", clip=1.0)
    for quantizer in (free, given):
        quantizer.initialise(x)
        assert not quantizer.signed
    assert (free.clip.item(), given.clip.item()) == (4.0, 1.0)
    free.initialise(torch.zeros(3))
    assert free.clip.item() == 1.0


def test_inputs_with_negative_values_are_signed() -> None:
    quantizer, x = make(4, "input"), torch.tensor([-2.0, 0.0, 1.0], dtype=torch.float64)
    quantizer.initialise(x)
    assert quantizer.codes(x).tolist() == [-7, 0, round(7 / 1.6)]
    torch.testing.assert_close(quantizer(x)[0], torch.tensor(-1.6, dtype=torch.float64))


def test_the_clip_may_change_its_sign() -> None:
    x = torch.randn(20, dtype=torch.float64)
    one, other = make(3), make(3)
    other.raw_clip.data.fill_(-1.0)
    assert torch.equal(one(x), other(x))


@pytest.mark.parametrize(
    ("role", "fields", "message"),
    [
        ("weight", {"signed": False}, "signed=true"),
        ("weight", {"narrow": True}, "narrow=false"),
        ("weight", {"granularity": "channel"}, "granularity=channel"),
        ("weight", {"options": {"normalise": "yes"}}, "weight.options.normalise=yes"),
        ("input", {"options": {"normalise": True}}, "input.options.normalise=True"),
        ("weight", {"options": {"clip": 0}}, "weight.options.clip=0"),
    ],
)
def test_bad_settings_are_refused(role: str, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_quantizer(QuantizerSpec("liq", 4, **fields), (4, 3, 3, 3), 0 if role == "weight" else None, role)


def test_a_standardised_weight_compiles_to_one_graph_for_all_widths() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    quantizer, w = make(4, shape=(4, 3, 3, 3)), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    compiled = torch.compile(quantizer, backend=counter, fullgraph=True)
    for bits in (4.0, 2.0, 8.0):
        quantizer.bits = torch.tensor(bits)
        torch.testing.assert_close(compiled(w), quantizer(w))
    assert counter.frame_count == 1


@pytest.mark.parametrize(("bits", "bops"), [(4, 674643968), (3, 392052736), (2, 190201856)])
def test_bops_of_the_network_of_the_paper(bits: int, bops: int) -> None:  # check 7
    net = resnet20(num_classes=100, shortcut="B", preactivation=True)
    structure = net.structure()
    ends = [{"match": end, "weight": {"bits": 8}, "input": {"bits": 8}} for end in ("@first", "@last")]
    slots = {slot: {"name": "liq", "bits": bits} for slot in ("weight", "input")}
    convert(net, Recipe.from_config({**slots, "rules": ends}), structure.first, structure.last)
    assert cost_report(net, (3, 32, 32), structure.first, structure.last)["bops"] == bops
