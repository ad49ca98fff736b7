"""SDQ: golden vectors of the search and the identities of its formulas; EBR's and the distillation's vectors have their
own tests, test_bin_regularization and test_distillation_forms."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from callbacks.sdq.formulas import (
    LEAST,
    error_weight,
    improbabilities,
    logistic_noise,
    mixture,
    relaxed_coin,
    share_of_higher,
)
from callbacks.sdq.pressure import qer, squared_error
from callbacks.sdq.quantizer import StochasticWidth
from research.quant.quantizers import Quantizer, QuantizerSpec, build_quantizer

DOUBLE = torch.float64
OWN = "callbacks.sdq.ConstantMaxDoReFa"


def weight_quantizer(bits: int, name: str = OWN) -> Quantizer:
    """In float64."""
    return build_quantizer(QuantizerSpec(name, bits), (), None, "weight").double()


def coin(bits: tuple[int, int] = (4, 3), beta: float = 0.7, name: str = OWN, **options: object) -> StochasticWidth:
    """A quantizer of two widths in float64."""
    settings: dict[str, object] = {"start": beta, "tau": 1.0, "choice": "sample", **options}
    return StochasticWidth(weight_quantizer(bits[0], name), bits, **settings).double()  # type: ignore[arg-type]


@pytest.fixture
def vectors(golden: Callable[[str], dict[str, np.ndarray]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in golden("sdq").items()}


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.detach().to(DOUBLE), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("which", ["hi", "lo"])
def test_golden_weights_and_their_gradient_at_both_widths(which: str, vectors: dict[str, Tensor]) -> None:  # check 4
    w = vectors["w"].requires_grad_()
    w_q = weight_quantizer(int(vectors[f"b_{which}"]))(w)
    same(w_q, vectors[f"q_{which}"])
    (gradient,) = torch.autograd.grad((w_q * vectors["w_gout"]).sum(), w)
    same(gradient, vectors["w_grad_ste"])


def test_golden_draws(vectors: dict[str, Tensor]) -> None:
    u, high, low = vectors["draw_u"], vectors["b_hi"], vectors["b_lo"]
    share = share_of_higher(vectors["beta"].expand_as(u), logistic_noise(u), 1.0, "sample")
    assert torch.equal(mixture(share, high, low), vectors["draw_bits"])


def test_golden_relaxed_draws(vectors: dict[str, Tensor]) -> None:
    first, second = vectors["gs_noise"].T
    tau, beta = float(vectors["gs_tau"]), vectors["beta"].expand_as(first).clone().requires_grad_()
    soft = relaxed_coin(beta, first - second, tau)
    same(soft, vectors["gs_soft"])
    hard = share_of_higher(beta, first - second, tau, "sample")
    assert torch.equal(hard.detach(), vectors["gs_hard"])
    for value in (soft, hard):
        same(torch.autograd.grad(value.sum(), beta)[0], vectors["gs_dsoft_dbeta"])


def test_golden_mixture_and_its_gradient(vectors: dict[str, Tensor]) -> None:
    beta = vectors["beta"].clone().requires_grad_()
    noise = vectors["gs_noise"][0, 0] - vectors["gs_noise"][0, 1]
    soft = relaxed_coin(beta, noise, float(vectors["gs_tau"]))
    mixed = mixture(soft, vectors["q_hi"], vectors["q_lo"])
    same(mixed, vectors["mix_out"])
    (gradient,) = torch.autograd.grad((vectors["w_gout"] * mixed).sum(), beta)
    same(gradient, vectors["mix_dloss_dbeta"])
    expected = mixture(beta, vectors["q_hi"], vectors["q_lo"])
    (exact,) = torch.autograd.grad((vectors["w_gout"] * expected).sum(), beta)
    same(exact, vectors["exact_dEloss_dbeta"])


def test_golden_quantization_errors(vectors: dict[str, Tensor]) -> None:
    beta = vectors["beta"].clone().requires_grad_()
    high, low = ((vectors["w"] - vectors[name]).square().sum() for name in ("q_hi", "q_lo"))
    same(high, vectors["qe_hi"])
    same(low, vectors["qe_lo"])
    expected = mixture(beta, high, low)
    same(expected, vectors["qe_expected"])
    same(torch.autograd.grad(expected, beta)[0], vectors["qe_dbeta"])


@pytest.mark.parametrize("tau", [0.1, 1.0, 5.0])
def test_the_higher_width_is_drawn_with_its_probability(tau: float) -> None:  # check 1
    u = torch.rand(10_000, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    for beta in (0.3, 0.7, 1 - LEAST):
        drawn = share_of_higher(torch.full_like(u, beta), logistic_noise(u), tau, "sample")
        assert set(drawn.unique().tolist()) <= {0.0, 1.0}
        assert float(drawn.mean()) == pytest.approx(beta, abs=0.015)
        assert torch.equal(drawn, (u < beta).to(DOUBLE))


def test_a_forward_pass_is_one_of_the_two_widths_for_the_whole_layer() -> None:  # check 2
    torch.manual_seed(0)
    w, quantizer = torch.randn(6, 5, dtype=DOUBLE), coin()
    outcomes = {"high": quantizer.higher(w), "low": quantizer.lower(w)}
    assert not torch.equal(*outcomes.values())
    seen = set()
    for u in torch.rand(40, dtype=DOUBLE):
        quantizer.noise.copy_(logistic_noise(u))
        value = quantizer(w).detach()
        (name,) = [name for name, outcome in outcomes.items() if torch.equal(value, outcome)]
        assert name == ("high" if float(u) < 0.7 else "low")
        seen.add(name)
    assert seen == set(outcomes)


def test_the_gradient_of_the_probability_by_finite_differences() -> None:  # check 3
    torch.manual_seed(1)
    w, upstream = torch.randn(7, 3, dtype=DOUBLE), torch.randn(7, 3, dtype=DOUBLE)
    for tau in (0.5, 1.0, 2.0):
        quantizer = coin(tau=tau)
        quantizer.noise.copy_(torch.tensor(-0.4, dtype=DOUBLE))
        (gradient,) = torch.autograd.grad((upstream * quantizer(w)).sum(), quantizer.beta)

        def loss(beta: float, tau: float = tau, quantizer: StochasticWidth = quantizer) -> float:
            soft = relaxed_coin(torch.tensor(beta, dtype=DOUBLE), quantizer.noise, tau)
            return float((upstream * mixture(soft, quantizer.higher(w), quantizer.lower(w))).sum())

        assert float(gradient) == pytest.approx((loss(0.7 + 1e-6) - loss(0.7 - 1e-6)) / 2e-6, rel=1e-6)


def test_the_gradient_of_the_weight_does_not_depend_on_the_draw() -> None:  # check 4
    torch.manual_seed(2)
    w, upstream = torch.randn(4, 9, dtype=DOUBLE, requires_grad=True), torch.randn(4, 9, dtype=DOUBLE)
    quantizer, gradients = coin(), []
    for noise in (-3.0, 3.0):
        quantizer.noise.copy_(torch.tensor(noise))
        gradients.append(torch.autograd.grad((upstream * quantizer(w)).sum(), w)[0])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


def test_interpolation_is_the_expected_weight() -> None:
    w, quantizer = torch.randn(5, 5, dtype=DOUBLE), coin(beta=0.75, choice="interpolate")
    for noise in (0.0, -9.0):
        quantizer.noise.fill_(noise)
        torch.testing.assert_close(quantizer(w), 0.75 * quantizer.higher(w) + 0.25 * quantizer.lower(w))


@pytest.mark.parametrize("name", [OWN, "dorefa", "lsq", "minmax"])
@pytest.mark.parametrize(("beta", "width"), [(0.7, 4), (0.3, 3)])
def test_evaluation_takes_the_more_probable_width(name: str, beta: float, width: int) -> None:
    w, quantizer = torch.randn(6, 6, dtype=DOUBLE), coin(beta=beta, name=name).eval()
    quantizer.initialise(w)
    alone = weight_quantizer(width, name)
    alone.initialise(w)
    assert int(quantizer.bits) == width and float(quantizer.expected_bits.detach()) == pytest.approx(3 + beta)
    assert torch.equal(quantizer(w), alone(w))
    assert torch.equal(quantizer.codes(w), alone.codes(w))
    assert torch.equal(quantizer.dequantize(quantizer.codes(w)), quantizer(w))
    assert [float(limit) for limit in quantizer.limits()] == [float(limit) for limit in alone.limits()]
    assert quantizer.grid == alone.grid


def test_a_step_down_keeps_the_lower_range_and_starts_anew() -> None:
    w, quantizer = torch.randn(6, 6, dtype=DOUBLE), coin((4, 3), 0.9, "lsq")
    quantizer.initialise(w)
    quantizer.lower.raw_scale.data.mul_(1.7)  # type: ignore[operator]
    trained = quantizer.lower(w).detach()
    quantizer.beta.data.fill_(0.05)
    quantizer.step_down(2, w)
    assert (int(quantizer.higher.bits), int(quantizer.lower.bits), int(quantizer.bits)) == (3, 2, 3)
    assert float(quantizer.beta) == pytest.approx(0.9) and bool(quantizer.undecided)
    assert torch.equal(quantizer.eval()(w), trained)
    fresh = weight_quantizer(2, "lsq")
    fresh.initialise(w)
    assert torch.equal(quantizer.lower(w), fresh(w))
    quantizer.step_down(None, w)
    quantizer.train().noise.copy_(torch.tensor(-50.0))
    assert not bool(quantizer.undecided)
    assert torch.equal(quantizer(w), fresh(w)), "nothing is drawn any more"
    assert float(torch.autograd.grad(quantizer(w).sum(), quantizer.beta)[0]) == 0


@pytest.mark.parametrize("width", [4, 3, 2])
def test_any_reached_width_can_be_decided(width: int) -> None:
    w, quantizer, alone = torch.randn(6, 6, dtype=DOUBLE), coin((4, 3), 0.9, "lsq"), weight_quantizer(width, "lsq")
    quantizer.initialise(w)
    alone.initialise(w)
    quantizer.decide(width, w)
    assert int(quantizer.bits) == width
    assert torch.equal(quantizer(w), alone(w))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_weighted_error_counts_bits_times_weights(bits: int) -> None:
    w = torch.atanh(torch.linspace(-1, 1, 40_001, dtype=DOUBLE)[1:-1] * 0.999)  # evenly spread over the grid
    weighted = squared_error(weight_quantizer(bits), w) * error_weight(torch.tensor(float(bits)), 2 * w.numel())
    assert float(weighted) == pytest.approx(bits / 3 / 2, rel=0.02)


def test_only_weighted_errors_press_downwards_and_large_layers_more() -> None:  # the sign analysis
    torch.manual_seed(3)
    weights = [torch.rand(size, dtype=DOUBLE) * 2 - 1 for size in (200, 4000)]
    pairs = [(coin(), w) for w in weights]
    gradients = {}
    for weighting in ("expected", "weighted"):
        beta = torch.full((2,), 0.9, dtype=DOUBLE, requires_grad=True)
        (gradients[weighting],) = torch.autograd.grad(qer(beta, pairs, weighting), beta)
    assert bool((gradients["expected"] < 0).all())
    assert bool((gradients["weighted"] > 0).all()) and float(gradients["weighted"][1]) > 10 * gradients["weighted"][0]


def test_improbabilities_are_lowest_at_the_more_probable_width() -> None:
    found = improbabilities([2, 3, 4], 0.7, 0.9)
    assert found == pytest.approx({4: -math.log(0.7), 3: -math.log(0.3), 2: -math.log(0.3) - math.log(0.1)})
    assert min(found, key=lambda width: found[width]) == 4
    low = improbabilities([2, 3, 4], 0.3, 0.9)
    assert min(low, key=lambda width: low[width]) == 3
    assert improbabilities([2], 0.9, 0.9) == {2: 0.0}
