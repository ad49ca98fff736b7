"""What every registered quantizer keeps, for every role, granularity, width and option that changes its arithmetic."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from research.quant.quantizers import REGISTRY, QuantizerSpec, build_quantizer, quantizer_class
from research.quant.quantizers.base import MAX_BITS, Quantizer

OPTIONS: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("minmax", "input"): [{"symmetric": False}, {"power_of_two": True}, {"mask": "round_first"}],
    ("minmax", "weight"): [{"symmetric": False, "mask": "round_first"}],
    ("lsq", "weight"): [{"mask": "round_first"}],
    ("lsq", "input"): [{"gradient_factor": False, "count_batch": False}],
    ("lsq_plus", "input"): [{"configuration": c} for c in ("C1", "C2", "C3")] + [{"offset": "integer"}],
    ("lsq_plus", "weight"): [{"configuration": "C4"}, {"configuration": "C3", "offset": "integer"}],
    ("pact", "input"): [{"lower": -2.0, "alpha": 3.0}],
    ("dorefa", "weight"): [{"weight_grid": "uniform", "eps": 1e-5}],
    ("binary", "weight"): [{"form": "xnor"}],
    ("n2uq", "weight"): [{"grad_mode": "plain"}],
    ("n2uq", "input"): [{"calibrate": False}],
    ("srq", "weight"): [{"mcste": "all_classes"}],
    ("srq", "input"): [{"mcste": "all_classes"}],
}
SHAPE = (4, 3, 2)


@dataclass(frozen=True)
class Case:
    """One quantizer to build."""

    name: str
    role: str
    granularity: str
    options: tuple[tuple[str, Any], ...] = ()
    init: str = "minmax"

    def __str__(self) -> str:
        return "-".join([self.name, self.role, self.granularity, *(f"{k}={v}" for k, v in self.options)])

    @property
    def widths(self) -> range:
        return range(quantizer_class(self.name).min_bits[self.role], quantizer_class(self.name).max_bits + 1)

    def build(self, bits: int, dtype: torch.dtype = torch.float32) -> Quantizer:
        """In evaluation mode, where no state moves; at most as wide as the quantizer can be."""
        bits = min(bits, self.widths[-1])
        spec = QuantizerSpec(self.name, bits, granularity=self.granularity, init=self.init, options=dict(self.options))
        weight = self.role == "weight"
        return build_quantizer(spec, SHAPE if weight else (), 0 if weight else None, self.role).to(dtype).eval()

    def data(self, dtype: torch.dtype = torch.float32) -> Tensor:
        x = torch.randn(SHAPE, dtype=dtype)
        return x if self.role == "weight" else torch.nn.functional.silu(2 * x)


def all_cases() -> list[Case]:
    cases = []
    for name in REGISTRY:
        for role in ("weight", "input"):
            per_channel = role == "weight" and quantizer_class(name).channelwise
            for granularity in ("tensor", "channel") if per_channel else ("tensor",):
                for options in [{}, *OPTIONS.get((name, role), [])]:
                    cases.append(Case(name, role, granularity, tuple(options.items())))
    return cases


CASES = all_cases()
RESCALING = {("ewgs", "weight"), ("ewgs", "input"), ("dorefa", "weight"), ("pact", "weight"), ("n2uq", "weight")}
RESCALING |= {("binary", "weight")}
IDEMPOTENT = [case for case in CASES if (case.name, case.role) not in RESCALING]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def assert_on_grid(quantizer: Quantizer, x: Tensor) -> Tensor:
    """`x` quantized; its codes give exactly that, by the quantizer and by its grid, and respect the limits."""
    out, codes = quantizer(x), quantizer.codes(x)
    assert codes.dtype == torch.int32 and codes.shape == x.shape
    assert out.dtype == x.dtype and torch.equal(out, quantizer.dequantize(codes))
    assert torch.equal(out, quantizer.grid.values(codes, quantizer.scale, quantizer.zero_point))
    for low, high in (quantizer.limits(), quantizer.grid.limits(quantizer.bits)):
        assert ((codes >= low) & (codes <= high)).all()
    if quantizer.grid.kind == "midrise":
        assert ((codes % 2 == 1) | (quantizer.bits == 0)).all()
    return out


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_is_the_value_of_the_codes(case: Case, dtype: torch.dtype) -> None:
    for bits in case.widths:
        quantizer, x = case.build(bits, dtype), case.data(dtype)
        quantizer.initialise(x)
        assert quantizer.initialised
        out = assert_on_grid(quantizer, x)
        assert len(out.unique()) <= 2**bits * (SHAPE[0] if case.granularity == "channel" else 1)
        assert_on_grid(quantizer, 5 * x)
        for width in range(MAX_BITS + 1):
            quantizer.bits = torch.tensor(float(width))
            assert_on_grid(quantizer, x)


@every_case
def test_bits_per_channel_and_no_bits(case: Case) -> None:
    quantizer, x = case.build(4), case.data()
    quantizer.initialise(x)
    quantizer.bits = torch.tensor([0.0, 2.0, 3.0, 8.0]).reshape(4, 1, 1)
    out = assert_on_grid(quantizer, x)
    assert (out[0] == 0).all() and (out[3] != 0).any()
    quantizer.bits = torch.tensor(0.0)
    assert (assert_on_grid(quantizer, x) == 0).all()


@pytest.mark.parametrize("case", IDEMPOTENT, ids=str)
def test_quantizing_twice_changes_nothing(case: Case) -> None:
    for bits in case.widths:
        quantizer, x = case.build(bits), case.data()
        quantizer.initialise(x)
        once = quantizer(x)
        assert torch.equal(quantizer(once), once)


@every_case
def test_relaxed_values_are_within_half_a_step(case: Case) -> None:
    for bits in range(max(2, case.widths[0]), case.widths[-1] + 1):
        quantizer, x = case.build(bits, torch.float64), case.data(torch.float64)
        quantizer.initialise(x)
        out = quantizer(x)
        quantizer.mode = "relax"
        steps = (1 if quantizer.grid.kind == "midrise" else 0.5) * (1 + 1e-6)
        if "lower" in dict(case.options):
            steps = 1.0  # PACT's clips fall between two codes, the last half step has none of its own
        relaxed, scale = quantizer(x), quantizer.scale
        if quantizer.grid.kind == "codebook":  # only between its levels, whose greatest distance counts
            relaxed, scale = torch.maximum(torch.minimum(relaxed, scale[..., -1]), scale[..., 0]), scale.diff().amax(-1)
        assert ((relaxed - out).abs() <= steps * scale).all()
        assert not torch.equal(quantizer(x), out)
        quantizer.mode = "identity"
        assert quantizer(x) is x


@every_case
def test_gradients_are_finite(case: Case) -> None:
    for bits in (0, *case.widths):
        for scale in (1.0,) if (case.name, case.role) == ("binary", "input") else (1.0, 0.0):  # it refuses zeros
            quantizer, x = case.build(bits), (scale * case.data()).requires_grad_()
            quantizer.initialise(x)
            (quantizer(x) * torch.randn(SHAPE)).sum().backward()
            for value in (x, *quantizer.parameters()):
                assert value.grad is not None and torch.isfinite(value.grad).all()


@every_case
def test_bfloat16_is_computed_in_float32(case: Case) -> None:
    quantizer, x = case.build(4), case.data().bfloat16()
    quantizer.initialise(x)
    out = quantizer(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, quantizer(x.float()).bfloat16())


@every_case
def test_state_survives_a_round_trip(case: Case) -> None:
    quantizer, x = case.build(3), case.data()
    shapes = {name: value.shape for name, value in quantizer.state_dict().items()}
    quantizer.initialise(x)
    out = quantizer(x)
    state = quantizer.state_dict()
    assert {name: value.shape for name, value in state.items()} == shapes
    restored = case.build(3)
    restored.load_state_dict(state)
    assert restored.initialised and torch.equal(restored(x), out)


@every_case
def test_parameter_options_name_parameters(case: Case) -> None:
    quantizer = case.build(4)
    names = dict(quantizer.named_parameters())
    assert all(name in names or hasattr(quantizer, name) for name in quantizer.parameter_options)
    learned = {name for name in names if name not in quantizer.parameter_options}
    assert learned <= {"alpha", "beta"}  # PACT decays its clips


@pytest.mark.parametrize("name", REGISTRY)
def test_calibration_from_observed_batches(name: str) -> None:
    case = Case(name, "input", "tensor")
    batches = [case.data() for _ in range(3)]
    quantizer, direct = case.build(4), case.build(4)
    quantizer.mode = "observe"
    assert all(quantizer(x) is x for x in batches)
    quantizer.initialise_from_observed()
    direct.initialise(torch.cat([torch.cat([x.flatten(), x.amin().view(1), x.amax().view(1)]) for x in batches]))
    for mine, expected in zip(quantizer.parameters(), direct.parameters(), strict=True):
        assert torch.equal(mine, expected)
    with pytest.raises(ValueError, match="saw no data"):
        quantizer.initialise_from_observed()


COMPILED = [
    Case("minmax", "input", "tensor", (("symmetric", False),)),
    Case("lsq", "weight", "channel"),
    Case("lsq_plus", "input", "tensor"),
    Case("lsq_plus", "input", "tensor", (("offset", "integer"),)),
    Case("pact", "input", "tensor"),
    Case("dorefa", "weight", "tensor"),
    Case("ewgs", "weight", "tensor"),
    Case("ewgs", "input", "tensor"),
    Case("lq_nets", "weight", "channel"),
    Case("lq_nets", "input", "tensor"),
    Case("binary", "weight", "channel"),
    Case("binary", "input", "tensor"),
    Case("n2uq", "weight", "channel"),
    Case("n2uq", "input", "tensor"),
    Case("srq", "weight", "channel"),
    Case("srq", "input", "tensor", (("mcste", "all_classes"),)),
]


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiled_equals_eager_with_one_graph_for_all_widths(case: Case) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    quantizer, x = case.build(4), case.data()
    quantizer.initialise(x)
    compiled = torch.compile(quantizer, backend=counter, fullgraph=True)
    upstream = torch.randn(SHAPE)
    for bits in (4.0, 2.0, 8.0):
        quantizer.bits = torch.tensor(bits)
        results = []
        for forward in (quantizer, compiled):
            leaf = x.clone().requires_grad_()
            quantizer.zero_grad()
            out = forward(leaf)
            (out * upstream).sum().backward()
            results.append([out, leaf.grad, *(p.grad.clone() for p in quantizer.parameters())])
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager)
    assert counter.frame_count == 1
