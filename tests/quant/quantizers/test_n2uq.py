"""N2UQ: golden vectors of the official modules, the cheap checks of its specification, and what our options add."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, library, nn

from research.deploy.artifact import load_artifact, save_artifact
from research.deploy.onnx import export_onnx
from research.models.bias_prelu import BiasPReLU
from research.quant.calibrate import calibrate
from research.quant.compiler import compiler_options
from research.quant.convert import convert
from research.quant.gste import (
    _ramp_by_segment,
    _ramp_by_table,
    _terms,
    _terms_in_one_pass,
    gste_ramp,
    segments,
)
from research.quant.quantizers import QuantizerSpec, build_quantizer
from research.quant.quantizers.n2uq import N2UQ, RANGE
from research.quant.recipe import Recipe
from research.targets import resolve_target

Golden = Callable[[str], dict[str, np.ndarray]]
LEARNED = ("start", "a", "scale1", "scale2")
DOUBLE = torch.float64


def make(bits: int, role: str = "input", shape: tuple[int, ...] = (), **fields: Any) -> N2UQ:
    options = {key: fields.pop(key) for key in ("calibrate", "grad_mode") if key in fields}
    spec = QuantizerSpec("n2uq", bits, options=options, **fields)
    quantizer = build_quantizer(spec, shape, 0 if role == "weight" else None, role).double()
    assert isinstance(quantizer, N2UQ)
    return quantizer


def set_(quantizer: N2UQ, **values: Tensor) -> N2UQ:
    for name, value in values.items():
        parameter = getattr(quantizer, name)
        parameter.data.copy_(value.reshape(parameter.shape))
    return quantizer


def uneven(bits: int) -> N2UQ:
    """Random thresholds, increasing by construction."""
    count = 2**bits - 1
    learned = {"start": torch.tensor(-0.3), "a": 0.1 + torch.rand(count)}
    return set_(make(bits), **learned, scale1=torch.tensor(1.3), scale2=torch.tensor(0.7))


def run(quantizer: N2UQ, x: Tensor, upstream: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Output and gradient of `x`; the learned parameters get theirs anew."""
    quantizer.zero_grad()
    x = x.clone().requires_grad_()
    out = quantizer(x)
    (out * upstream).sum().backward()
    return out.detach(), x.grad


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.detach().reshape(expected.shape), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("prefix", "bits"), [("ltq_init2_", 2), ("ltq2_", 2), ("ltq3_", 3)])
def test_golden_thresholds(golden: Golden, prefix: str, bits: int) -> None:
    case = {k.removeprefix(prefix): torch.from_numpy(v) for k, v in golden("n2uq").items() if k.startswith(prefix)}
    quantizer = set_(make(bits), **{name: case[name] for name in LEARNED})
    out, grad = run(quantizer, case["x"], case["upstream"])
    close(out, case["y"])
    close(grad, case["grad_x"])
    for name in LEARNED:
        close(getattr(quantizer, name).grad, case[f"grad_{name}"])


@pytest.mark.parametrize("bits", [2, 4])
def test_golden_weights(golden: Golden, bits: int) -> None:
    case = {k.removeprefix(f"wq{bits}_"): torch.from_numpy(v) for k, v in golden("n2uq").items() if f"wq{bits}_" in k}
    quantizer = make(bits, "weight", tuple(case["w"].shape), granularity="channel")
    out, grad = run(quantizer, case["w"], case["upstream_wq"])
    close(out, case["wq"])
    close(grad, case["grad_w"])
    assert bool(case["clip_val_has_grad"] > 0) == bool(list(quantizer.parameters()))


def test_the_initial_quantizer_is_the_clipped_straight_through_estimator() -> None:  # check 1
    x = torch.linspace(-1, 3, 4001, dtype=DOUBLE) + 1e-4
    quantizer = make(2, calibrate=False)
    quantizer.initialise(x)
    assert quantizer.a.tolist() == pytest.approx([2 / 3] * 3)
    set_(quantizer, a=torch.full((3,), 2 / 3, dtype=DOUBLE))  # not rounded to float32
    out, grad = run(quantizer, x, 0.3)
    close(out, 2 / 3 * torch.clamp(torch.ceil(x * 1.5 - 0.5), 0, 3))
    close(grad, 0.3 * ((x > 0) & (x <= 2)).double())
    edges = torch.tensor([0.0, 2.0, 2.1], dtype=DOUBLE)
    assert run(quantizer, edges)[1].tolist() == pytest.approx([0, 1, 0])


def test_stretching_the_segments_with_the_input_changes_nothing() -> None:  # check 2
    x, one, other = torch.randn(200, dtype=DOUBLE), uneven(3), make(3)
    scaled = {name: 1.7 * getattr(one, name).detach() for name in ("start", "a", "scale1")}
    set_(other, **scaled, scale2=one.scale2.detach())
    for mine, expected in zip(run(other, x), run(one, x), strict=True):
        close(mine, expected)


def test_thresholds_increase_even_with_negative_lengths() -> None:  # check 3
    quantizer = set_(make(3), a=torch.tensor([0.2, -0.5, 0.0, 1e-3, 0.4, -1.0, 0.1], dtype=DOUBLE))
    assert bool((quantizer.thresholds.diff() > 0).all())
    run(quantizer, torch.linspace(-1, 2, 500, dtype=DOUBLE))
    assert (quantizer.a.grad != 0).tolist() == [True, False, False, False, True, False, True]


def test_gradients_are_those_of_the_ramp() -> None:  # check 4
    quantizer, x, g = uneven(2), torch.randn(300, dtype=DOUBLE), torch.randn(300, dtype=DOUBLE)
    run(quantizer, x, g)
    quantizer.mode, step = "relax", 1e-6
    for name in ("start", "a"):
        parameter = getattr(quantizer, name)
        for index in range(parameter.numel()):
            values = []
            for sign in (1, -1):
                parameter.data.view(-1)[index] += sign * step
                values.append(float((g * quantizer(x).detach()).sum()))
                parameter.data.view(-1)[index] -= sign * step
            difference = (values[0] - values[1]) / (2 * step)
            assert float(parameter.grad.view(-1)[index]) == pytest.approx(difference, rel=1e-5)


def test_the_ramp_is_continuous_and_halfway_at_the_thresholds() -> None:  # check 5
    quantizer = uneven(3)
    borders, lengths = segments(quantizer.start, quantizer.a)
    for shift in (-1e-12, 1e-12):
        close(gste_ramp(borders + shift, borders, lengths)[0] + 1, torch.arange(1.0, 9, dtype=DOUBLE))
    ramp, count = gste_ramp(quantizer.thresholds, borders, lengths)
    close(ramp, torch.arange(7, dtype=DOUBLE) + 0.5)
    assert count.tolist() == list(range(7)), "a value at a threshold is not above it"


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_weights_have_all_levels_but_zero_and_a_scale_that_follows(bits: int, granularity: str) -> None:  # check 6
    w = torch.randn(4, 500, dtype=DOUBLE) * torch.tensor([[0.1], [1.0], [2.0], [3.0]])
    quantizer = make(bits, "weight", (4, 500), granularity=granularity)
    out = quantizer(w)
    rows = out if granularity == "channel" else out.reshape(1, -1)
    for row in rows:
        levels = row.unique()
        assert len(levels) == 2**bits and not bool((levels == 0).any())
        close(levels, -levels.flip(0))
    codes = quantizer.codes(w)
    close(quantizer(2.5 * w), 2.5 * out)
    assert torch.equal(quantizer.codes(2.5 * w), codes)


def occupancy(w: Tensor, bits: int) -> Tensor:
    codes = make(bits, "weight", tuple(w.shape)).codes(w)
    return torch.bincount((codes.flatten().long() + 2**bits - 1) // 2, minlength=2**bits) / w.numel()


def test_levels_are_used_almost_equally() -> None:  # check 7
    normal = torch.erfinv(torch.linspace(-1, 1, 200_001, dtype=DOUBLE)[1:-1]) * 2**0.5
    torch.testing.assert_close(occupancy(normal, 2), torch.tensor([0.212, 0.287, 0.287, 0.213]), rtol=0, atol=2e-3)
    for bits, entropy in ((2, 1.984), (3, 2.979), (4, 3.948)):
        shares = occupancy(normal, bits)
        assert float(-(shares * shares.log2()).sum()) == pytest.approx(entropy, abs=2e-3)
        even = occupancy(torch.linspace(-0.3, 0.3, 160_000, dtype=DOUBLE), bits)
        torch.testing.assert_close(even, torch.full_like(even, 2.0**-bits), rtol=0, atol=1e-4)


def test_the_official_gradient_of_a_weight_knows_no_clip() -> None:  # check 8
    w, g = torch.randn(5, 60, dtype=DOUBLE) * 3, torch.randn(5, 60, dtype=DOUBLE)
    official = make(3, "weight", (5, 60), granularity="channel")
    scale = w.abs().mean(1, keepdim=True) * 7 / 4
    assert bool((w.abs() > scale).any())
    close(run(official, w, g)[1] * scale, g)
    plain = make(3, "weight", (5, 60), granularity="channel", grad_mode="plain")
    assert torch.equal(run(plain, w, g)[1], g)
    assert torch.equal(plain(w), official(w))


def test_an_empty_filter_is_quantized_to_finite_values() -> None:
    quantizer, w = make(2, "weight", (2, 9), granularity="channel"), torch.zeros(2, 9, dtype=DOUBLE)
    out, grad = run(quantizer, w)
    assert bool(out.isfinite().all() and grad.isfinite().all())


def test_a_calibrated_start_is_the_uniform_quantizer_of_its_range() -> None:
    x = 5 * torch.rand(1000, dtype=DOUBLE)
    quantizer, uniform = make(4, init="minmax"), make(4, init="minmax", calibrate=False)
    lsq = build_quantizer(QuantizerSpec("lsq", 4, init="minmax"), (), None, "input").double()
    for each in (quantizer, uniform, lsq):
        each.initialise(x)
    close(quantizer(x), lsq(x).detach())
    assert [getattr(uniform, name).item() for name in ("scale1", "scale2", "start")] == [1, 1, 0]
    assert float(uniform(x).detach().max()) == RANGE


def test_another_width_keeps_the_ramp() -> None:
    quantizer, x = uneven(3), torch.randn(400, dtype=DOUBLE)
    ramp = quantizer.transform(x)
    for bits in (1, 2, 4, 8):
        quantizer.bits = torch.tensor(float(bits))
        share = (2**bits - 1) / 7
        close(quantizer.transform(x), ramp * share)
        assert torch.equal(quantizer.codes(x), torch.ceil(ramp * share - 0.5).int())
    quantizer.bits = torch.tensor(3.0)
    borders, lengths = segments(quantizer.start, quantizer.a)
    above = quantizer.scale1 * x[:, None] > borders[:-1] + lengths / 2
    assert torch.equal(quantizer.codes(x), above.sum(1).int())


@pytest.mark.parametrize(
    ("role", "fields", "message"),
    [
        ("input", {"signed": True}, "unsigned inputs"),
        ("weight", {"signed": False}, "mid-rise weights"),
        ("weight", {"narrow": True}, "narrow=false"),
        ("input", {"granularity": "channel"}, "granularity=channel"),
        ("weight", {"options": {"grad_mode": "ste"}}, "weight.options.grad_mode='ste'"),
    ],
)
def test_bad_settings_are_refused(role: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_quantizer(QuantizerSpec("n2uq", 4, **fields), (4, 3), 0 if role == "weight" else None, role)


class Block(nn.Module):
    """Two convolutions with an activation between them, as a network of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu, self.conv2 = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.relu(self.conv1(x)))


BLOCK = {"_target_": "tests.quant.quantizers.test_n2uq.Block"}
ACTIVATION = {"_target_": "research.models.bias_prelu.BiasPReLU", "channels": 6}


def trained_block(bits: int) -> tuple[nn.Module, dict[str, Any], Tensor]:
    """A block as training could leave it: uneven thresholds, scales other than 1, biases that are not 0."""
    recipe = {slot: {"name": "n2uq", "bits": bits} for slot in ("weight", "input")}
    recipe["replace"] = [{"match": "relu", "module": ACTIVATION}]
    net, x = Block(), torch.randn(4, 3, 9, 9)
    convert(net, Recipe.from_config(recipe), "conv1", "conv2", lambda config: resolve_target(config, trusted=True))
    calibrate(net, [x])
    for parameter in net.parameters():
        if parameter.ndim <= 1:
            parameter.data *= 1 + 0.3 * torch.randn_like(parameter)
            parameter.data += 0.01 * torch.randn_like(parameter)
    return net.eval(), recipe, x


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_thresholds_are_deployed_as_comparisons(bits: int, tmp_path: Path) -> None:
    net, _, x = trained_block(bits)
    model = export_onnx(net, x, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), net(x), rtol=0, atol=1e-5)
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("Greater") == 2 * (2**bits - 1)
    assert "QuantizeLinear" not in operators and operators.count("DequantizeLinear") == 4


def test_the_exported_codes_are_equal_at_the_thresholds(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(1, 1, bias=False))
    convert(net, Recipe.from_config({"input": {"name": "n2uq", "bits": 3}}), "0", "0")
    quantizer = net[0].input_quantizer
    nn.init.uniform_(quantizer.a, 0.05, 0.6)
    x = quantizer.thresholds.detach()
    x = torch.cat([x, x.nextafter(torch.tensor(9.0)), x.nextafter(torch.tensor(-9.0))]).view(-1, 1)
    model = export_onnx(net.eval(), x, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input": x.numpy()})
    assert np.array_equal(found, net(x).detach().numpy())


def test_an_export_at_another_width_is_refused(tmp_path: Path) -> None:
    net, _, x = trained_block(2)
    net.conv2.input_quantizer.bits = torch.tensor(3.0)
    with pytest.raises(ValueError, match=r"conv2\.input: N2UQ \(mode quantize\) has thresholds for 2 bits"):
        export_onnx(net, x, tmp_path / "net.onnx")


def test_the_artifact_gives_the_network_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("research.targets.ALLOWED_PACKAGES", ("research", "tests"))
    net, recipe, x = trained_block(2)
    save_artifact(net, BLOCK, tmp_path, replace=recipe["replace"])
    assert torch.equal(load_artifact(tmp_path)(x), net(x))


def test_the_activation_starts_as_a_prelu_and_learns_three_vectors() -> None:
    activation, x = BiasPReLU(5), torch.randn(2, 5, 3, 3)
    assert torch.equal(activation(x), torch.where(x > 0, x, 0.25 * x))
    assert torch.equal(BiasPReLU(5, slope=0.0)(x), x.relu())
    nn.init.constant_(activation.bias, 0.5)
    nn.init.constant_(activation.shift, -2.0)
    torch.testing.assert_close(activation(x), torch.nn.functional.leaky_relu(x + 0.5, 0.25) - 2)
    activation(x).sum().backward()
    assert all(bool(p.grad.any()) and p.shape == (5,) for p in activation.parameters())
    with pytest.raises(ValueError, match="channels=0"):
        BiasPReLU(0)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_both_ways_to_the_ramp_are_one_function(bits: int) -> None:
    """Bit for bit, on borders and thresholds too, and in every derivative up to the order of the terms."""
    quantizer = uneven(bits)
    borders, lengths = (part.detach().requires_grad_() for part in segments(quantizer.start, quantizer.a))
    special = torch.cat([borders, quantizer.thresholds]).detach()
    u = torch.cat([special, torch.linspace(-1, 4, 300, dtype=DOUBLE)]).requires_grad_()
    upstream = torch.randn(len(u), dtype=DOUBLE, generator=torch.Generator().manual_seed(0))

    def everything(ramp_of: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        ramp, count = ramp_of(u, borders, lengths)
        first = torch.autograd.grad((ramp * upstream).sum(), (u, borders, lengths), create_graph=True)
        second = torch.autograd.grad(sum(each.square().sum() for each in first), (u, lengths))
        return [ramp, count, *first, *second]

    (ramp, count, *found), (same, counted, *expected) = everything(_ramp_by_segment), everything(_ramp_by_table)
    assert torch.equal(ramp, same) and torch.equal(count, counted)
    for one, other in zip(found, expected, strict=True):
        close(one, other)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("bits", "present"), [(1, 1), (2, 2), (3, 2), (3, 5), (6, 6), (2, 0)])
def test_the_fused_form_is_the_reference(bits: int, present: int, dtype: torch.dtype, tolerance: float) -> None:
    """Values bit for bit, every gradient to rounding, with few and many segments, at the own width and at others."""
    quantizer = uneven(bits).to(dtype)
    quantizer.bits = torch.tensor(float(present))
    x = torch.linspace(-1, 4, 6000, dtype=dtype).view(3, 4, 20, 25).requires_grad_()
    upstream = torch.randn(x.shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    learned = [getattr(quantizer, name) for name in LEARNED]

    def everything(kernels: str | None) -> list[Tensor]:
        quantizer.kernels = kernels
        values = quantizer(x)
        return [values, *torch.autograd.grad((values * upstream).sum(), (x, *learned))]

    (values, *gradients), (expected_values, *expected) = everything("traced"), everything(None)
    assert torch.equal(values, expected_values)
    for found, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=tolerance, atol=tolerance * float(reference.abs().max()))
    quantizer.kernels = "eager"
    with pytest.raises(RuntimeError, match="needs_double_backward"):
        torch.autograd.grad((quantizer(x) * upstream).sum(), x, create_graph=True)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("bits", "present"), [(2, 2), (2, 1), (4, 4)])
def test_a_compiled_network_takes_the_sums_in_one_pass(bits: int, present: int, layout: torch.memory_format) -> None:
    quantizer = uneven(bits).float()
    quantizer.bits = torch.tensor(float(present))
    quantizer.kernels = "traced"
    x = torch.linspace(-1, 4, 48_000).view(3, 20, 25, 32).contiguous(memory_format=layout).requires_grad_()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    learned = [getattr(quantizer, name) for name in LEARNED]

    def everything(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        values = function(x)
        return [values, *torch.autograd.grad((values * upstream).sum(), (x, *learned))]

    compiled = torch.compile(quantizer, fullgraph=True, options=compiler_options(1))
    (values, *gradients), (expected_values, *expected) = everything(compiled), everything(quantizer)
    assert torch.equal(values, expected_values)
    assert gradients[0].stride() == x.stride()
    for found, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-6, atol=1e-6 * float(reference.abs().max() + 100))


@pytest.mark.parametrize("shape", [(40,), (2, 3, 5, 4), (2, 3, 120, 80)], ids=str)
def test_the_pass_is_a_proper_operator(shape: tuple[int, ...]) -> None:
    """Its shapes are what the compiler is told, for any layout of the upstream gradient."""
    quantizer = uneven(2).float()
    borders, lengths = (part.detach() for part in segments(quantizer.start, quantizer.a))
    x, numbers = torch.randn(shape), torch.tensor([1.3, 0.4, 1.0])
    grad = torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))
    arguments = (x, grad, numbers[0], numbers[1], borders, lengths, numbers[2])
    library.opcheck(_terms_in_one_pass, arguments, test_utils=("test_schema", "test_faketensor"))
    for found, expected in zip(_terms_in_one_pass(*arguments), _terms(*arguments), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
