"""Eigenvalues, traces and densities: exact where the answer is known, marked where it is not reached."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch
from hessian_eigenthings.operators.base import LambdaOperator
from torch import Tensor

from research.curvature.estimates import shown
from research.curvature.operators import hessian
from research.curvature.quantizer_traces import quantizer_traces
from research.curvature.replay import Replay
from research.curvature.spectrum import block_traces, spectral_density, top_eigenvalues, trace
from research.quant.layers import quantizers
from research.quant.passes import passes
from tests.curvature.small import crossentropy, dense_hessian, small_batches, small_net


class Counting:
    """A dense symmetric matrix as an operator that counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.products = matrix, 0

    def matvec(self, v: Tensor) -> Tensor:
        self.products += 1
        return self.matrix @ v

    def operator(self) -> LambdaOperator:
        return LambdaOperator(self.matvec, len(self.matrix), dtype=self.matrix.dtype)


def with_spectrum(values: Sequence[float], seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    return q @ torch.tensor(values, dtype=torch.float64).diag() @ q.T


OUTLIERS = [9.0, -8.0, 5.0, *torch.linspace(0.1, 1, 117).tolist()]


def test_eigenvalues_vectors_and_residuals_of_a_known_spectrum() -> None:
    counting = Counting(with_spectrum(OUTLIERS))
    top = top_eigenvalues(counting.operator(), k=3, tolerance=1e-6, progress=False)
    assert top.values == pytest.approx([9, -8, 5], rel=1e-9)
    assert top.converged == (True,) * 3
    for value, residual, v in zip(top.values, top.residuals, top.vectors, strict=True):
        by_hand = float((counting.matrix @ v - value * v).norm() / v.norm()) / abs(value)
        assert residual == pytest.approx(by_hand, rel=1e-3, abs=1e-13)
    assert float(top.vectors[0].norm()) == pytest.approx(1)


def test_largest_and_smallest_are_asked_for_by_name() -> None:
    operator = Counting(with_spectrum(OUTLIERS)).operator()
    assert top_eigenvalues(operator, k=2, progress=False, which="LA").values == pytest.approx([9, 5], rel=1e-5)
    assert top_eigenvalues(operator, k=1, progress=False, which="SA").values == pytest.approx([-8], rel=1e-5)


def test_lanczos_is_extended_until_it_converges_and_no_product_is_made_twice() -> None:
    counting = Counting(with_spectrum([1 - 0.002 * i for i in range(150)]))
    top = top_eigenvalues(counting.operator(), k=2, tolerance=1e-3, max_iterations=150, progress=False)
    assert top.converged == (True, True)
    assert top.iterations > 20
    assert counting.products == top.iterations


def test_what_has_not_converged_is_marked_everywhere() -> None:
    counting = Counting(with_spectrum([1 - 1e-4 * i for i in range(300)]))
    top = top_eigenvalues(counting.operator(), k=2, tolerance=1e-6, max_iterations=22, progress=False)
    assert (top.iterations, counting.products, top.converged) == (22, 22, (False, False))
    record = json.loads(json.dumps(top.record(), allow_nan=False))
    assert [entry["converged"] for entry in record["values"]] == [False, False]
    assert str(top).count("(not converged)") == 2 and str(top).startswith("~")
    assert shown(1.23456, True) == "1.235" and shown(1.23456, False) == "~1.23 (not converged)"


def test_a_matrix_with_few_eigenvalues_gives_those() -> None:
    top = top_eigenvalues(Counting(with_spectrum([2.0] * 10 + [1.0] * 10)).operator(), k=5, progress=False)
    assert top.values == pytest.approx([2, 1])
    one = top_eigenvalues(Counting(with_spectrum([3.0])).operator(), k=1, progress=False)
    assert one.values == pytest.approx([3]) and one.converged == (True,)


def test_seeds_agree_and_repeat() -> None:
    operator = Counting(with_spectrum(OUTLIERS)).operator()
    first, again, other = (top_eigenvalues(operator, k=3, seed=seed, progress=False) for seed in (0, 0, 1))
    assert first == again and first.values != other.values
    assert first.values == pytest.approx(other.values, rel=1e-3)
    estimates = [trace(operator, 30, seed, progress=False) for seed in (0, 0, 1)]
    assert estimates[0] == estimates[1] != estimates[2]


def test_a_changed_vector_is_not_replayed() -> None:
    counting = Counting(with_spectrum([2.0, 1.0]))
    replay = Replay(counting.operator())
    one, other = torch.eye(2, dtype=torch.float64)
    for v in (one, other):
        replay.matvec(v)
    replay.rewind()
    replay.matvec(one)
    assert counting.products == 2
    torch.testing.assert_close(replay.matvec(one), counting.matrix @ one)
    assert counting.products == 3 and len(replay.inputs) == 2


@pytest.mark.parametrize(("probes", "explored"), [(30, False), (90, False), (20, True)])
def test_the_standard_error_of_the_trace_is_its_spread_over_seeds(probes: int, explored: bool) -> None:
    """By repetition: error over standard error has a mean square near 1 (Student's t)."""
    spectrum = [10.0, 5.0, *torch.linspace(-1, 1, 98).tolist()]
    operator = Counting(with_spectrum(spectrum)).operator()
    known = top_eigenvalues(operator, k=2, seed=7, progress=False).explored if explored else None
    estimates = [trace(operator, probes, seed, progress=False, known=known) for seed in range(150)]
    errors = torch.tensor([estimate.value - sum(spectrum) for estimate in estimates])
    claimed = torch.tensor([estimate.standard_error for estimate in estimates])
    assert abs(float(errors.mean())) < 3 * float(errors.std()) / 150**0.5, "unbiased"
    assert float(claimed.square().mean().sqrt() / errors.square().mean().sqrt()) == pytest.approx(1, abs=0.2)
    assert float((errors.abs() < 3 * claimed).double().mean()) > 0.95
    assert estimates[0].probes == probes


def test_the_explored_subspace_costs_nothing_and_takes_the_great_eigenvalues_out() -> None:
    counting = Counting(with_spectrum([100.0, -50.0, 20.0, *torch.linspace(-1, 1, 97).tolist()]))
    operator = counting.operator()
    found = top_eigenvalues(operator, k=3, progress=False)
    before = counting.products
    estimate = trace(operator, 10, progress=False, known=found.explored)
    assert counting.products - before == 10 == estimate.probes
    basis = found.explored.basis
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), rtol=0, atol=1e-10)
    assert found.explored.trace == pytest.approx(float((basis @ counting.matrix @ basis.T).trace()))
    assert abs(estimate.value - 70) < 4 * estimate.standard_error


def test_hutch_plus_plus_is_exact_on_low_rank() -> None:
    estimate = trace(Counting(with_spectrum([4.0, -1.0, 2.0, *[0.0] * 60])).operator(), 30, progress=False)
    assert estimate.value == pytest.approx(5) and estimate.standard_error < 1e-9
    assert str(trace(Counting(with_spectrum(OUTLIERS)).operator(), 30, progress=False)).count("±") == 1


def test_block_traces_are_those_of_the_diagonal_blocks() -> None:
    net, kinds = small_net(), ("weight", "norm_weight", "norm_bias")
    operator = hessian(net, crossentropy, small_batches(), kinds=kinds)
    names = list(operator.layout)
    dense = dense_hessian(net, "quantized", names)
    blocks = block_traces(operator, probes=25, seed=0, progress=False)
    assert list(blocks) == ["0", "1", "4"]
    for block, members in {"0": ["0.weight"], "1": ["1.weight", "1.bias"], "4": ["4.weight"]}.items():
        exact = sum(float(dense.diagonal()[operator.layout[name]].sum()) for name in members)
        assert abs(blocks[block].value - exact) < 3 * blocks[block].standard_error
    chosen = block_traces(operator, 25, 0, progress=False, groups={"ends": ["0.weight", "4.weight"]})
    assert chosen["ends"].value == pytest.approx(blocks["0"].value + blocks["4"].value)


def test_quantizer_traces_are_those_of_the_quantized_tensors() -> None:
    net = small_net()
    with passes(net, mode={"input": "identity"}):  # then only weights, whose dense traces are known
        dense = dense_hessian(net, "quantized").diagonal()
        found = quantizer_traces(net, crossentropy, small_batches(), probes=50)
    exact = {"0.weight_quantizer": float(dense[:18].sum()), "4.weight_quantizer": float(dense[18:].sum())}
    for name, value in exact.items():
        assert abs(found[name].value - value) < 3 * found[name].standard_error
    assert set(found) == {name for name, _ in quantizers(net)}


def test_quantizer_traces_do_not_depend_on_the_cut() -> None:
    whole, parts = (quantizer_traces(small_net(), crossentropy, small_batches(cuts), 50) for cuts in ((7,), (5, 2)))
    for name, estimate in whole.items():
        spread = (estimate.standard_error**2 + parts[name].standard_error ** 2) ** 0.5
        assert abs(estimate.value - parts[name].value) < 3.5 * spread


def test_the_spectral_density_has_mass_one_and_the_right_mean() -> None:
    spectrum = [*torch.linspace(-1, 1, 90).tolist(), *[5.0] * 10]
    found = spectral_density(Counting(with_spectrum(spectrum)).operator(), runs=20, steps=30, progress=False)
    step = float(found.grid[1] - found.grid[0])
    assert float(found.density.sum()) * step == pytest.approx(1, abs=0.02)
    assert float((found.density * found.grid).sum()) * step == pytest.approx(0.5, abs=0.16)
    beyond = float(found.density[found.grid > 3].sum()) * step
    assert beyond == pytest.approx(0.1, abs=0.03), "the share of the outliers"
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert len(record["grid"]) == len(record["density"]) == 1000 and record["steps"] == 30


def test_what_a_user_gets_wrong() -> None:
    operator = Counting(with_spectrum([1.0, 2.0])).operator()
    for call, message in (
        (lambda: top_eigenvalues(operator, k=3), "k=3"),
        (lambda: top_eigenvalues(operator, k=1, which="XX"), "which=XX"),  # type: ignore[arg-type]
        (lambda: top_eigenvalues(operator, k=1, tolerance=0), "tolerance=0"),
        (lambda: top_eigenvalues(operator, k=2, max_iterations=1), "max_iterations=1"),
        (lambda: trace(operator, 5), "probes=5"),
        (lambda: trace(operator, 1, known=top_eigenvalues(operator, k=1, progress=False).explored), "probes=1"),
        (lambda: spectral_density(operator, runs=0), "runs=0"),
        (lambda: block_traces(hessian(small_net(), crossentropy, small_batches()), 1), "probes=1"),
        (lambda: quantizer_traces(small_net(), crossentropy, small_batches(), 1), "probes=1"),
        (lambda: quantizer_traces(small_net(None), crossentropy, small_batches()), "per_quantizer=false"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
