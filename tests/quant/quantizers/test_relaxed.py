"""RQ and SRQ: vectors derived from their equations, the cheap checks of their specification, and their options."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import grad

from research.quant.quantizers import QuantizerSpec, build_quantizer
from research.quant.quantizers.relaxed import RelaxedQuantizer
from research.quant.quantizers.rq import RQ
from research.quant.relaxed_grid import (
    Noise,
    grid_mass,
    gumbel_noise,
    relaxed_choice,
    stochastic_mass,
    window,
)

Golden = Callable[[str], dict[str, np.ndarray]]
Case = dict[str, Tensor]
DOUBLE = torch.float64
ESTIMATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "rq": ("rq", {}),
    "rqst": ("rq", {"sample": "hard"}),
    "srq": ("srq", {}),
    "srqall": ("srq", {"mcste": "all_classes"}),
}


@pytest.fixture
def case(golden: Golden) -> Case:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in golden("srq").items()}


def make(name: str, bits: int, alpha: float = 0.25, sigma: float = 0.09, role: str = "weight", **options: Any) -> Any:
    """A quantizer with the given step and noise, in training."""
    spec = QuantizerSpec(name, bits, options={"sigma_floor": 0.0, "gradient_factor": False, **options})
    quantizer = build_quantizer(spec, (), None, role).double()
    assert isinstance(quantizer, RelaxedQuantizer)
    quantizer.log_scale.data.fill_(alpha).log_()
    quantizer.log_sigma.data.fill_(sigma).log_()
    return quantizer


def of_case(case: Case, estimator: str) -> Any:
    name, options = ESTIMATORS[estimator]
    temperature = {"temperature": float(case["tau"])} if name == "rq" else {}
    numbers = float(case["alpha"]), float(case["sigma"])
    return make(name, int(case["bits"]), *numbers, fuzz=float(case["fuzz"]), **options, **temperature)


def derivatives(quantizer: Any, out: Tensor, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Of ``sum(upstream * out)``; those of alpha and sigma follow from those of their logarithms."""
    gx, log_alpha, log_sigma = grad((out * upstream).sum(), [x, quantizer.log_scale, quantizer.log_sigma])
    return {"gx": gx, "galpha": log_alpha / quantizer.scale, "gsigma": log_sigma / quantizer.sigma}


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual.detach(), expected, rtol=tolerance, atol=1e-12)


def probabilities(quantizer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the whole grid and ``pi``, (..., points)."""
    low, high = quantizer.limits()
    points = window(torch.round(quantizer.transform(x).detach()), low, high, 2 ** int(quantizer.bits))
    noise = quantizer.noise_for(x)
    masses = torch.stack([quantizer.point_mass(x, point, noise) for point in points], -1)
    return torch.stack(points, -1), masses / masses.sum(-1, keepdim=True)


def test_golden_probabilities_and_evaluation(case: Case) -> None:
    quantizer = of_case(case, "rq").eval()
    points, pi = probabilities(quantizer, case["x"])
    assert torch.equal(points[0, 0], case["grid_int"])
    close(pi, case["pi"])
    close(quantizer(case["x"]), case["test_out"])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_golden_estimators(case: Case, estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("research.quant.quantizers.rq.gumbel_noise", lambda like: case["gumbel"])
    quantizer, x = of_case(case, estimator), case["x"].clone().requires_grad_()
    out = quantizer(x)
    close(out, case[f"{estimator}_out"])
    for name, value in derivatives(quantizer, out, x, case["gout"]).items():
        close(value, case[f"{estimator}_{name}"], 1e-9)


@pytest.mark.parametrize("role", ["weight", "input"])
def test_probabilities_sum_to_one_are_symmetric_and_truncated(role: str) -> None:  # check 1
    quantizer = make("srq", 4, role=role)
    points, pi = probabilities(quantizer, 4 * torch.randn(500, dtype=DOUBLE))
    assert bool((pi > 0).all())
    close(pi.sum(-1), torch.ones(500, dtype=DOUBLE))
    inside = points[0, 8] * quantizer.scale.detach()
    _, (below, above) = probabilities(quantizer, inside + torch.tensor([-0.07, 0.07], dtype=DOUBLE))
    close(below[3:14], above[3:14].flip(0).detach(), 1e-7)  # up to the ends of the grid
    last = make("srq", 4, sigma=0.03, role=role)
    _, (right,) = probabilities(last, last.scale.detach() * last.limits()[1] + torch.tensor([0.3], dtype=DOUBLE))
    assert float(right[-1].detach()) > 0.99


@pytest.mark.parametrize("sigma", [0.01, 0.09, 1.0])
@pytest.mark.parametrize("mcste", ["argmax_only", "all_classes"])
def test_training_is_evaluation_and_deterministic(sigma: float, mcste: str) -> None:  # check 2
    for role, bits in (("weight", 2), ("input", 3), ("weight", 8)):
        quantizer = make("srq", bits, sigma=sigma, role=role, mcste=mcste)
        x = 2 * torch.randn(1000, dtype=DOUBLE)
        out = quantizer(x)
        _, pi = probabilities(quantizer, x)
        assert torch.equal(quantizer(x), out) and torch.equal(make("rq", bits, role=role).eval()(x), out)
        assert torch.equal(quantizer.dequantize(quantizer.codes(x)), out)
        nearest = (quantizer.codes(x) - quantizer.limits()[0]).long()
        assert torch.equal(pi.gather(-1, nearest[:, None]).squeeze(-1), pi.amax(-1)), "none is more probable"


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_values_far_from_the_grid_are_clipped_without_a_gradient(estimator: str) -> None:
    name, options = ESTIMATORS[estimator]
    quantizer, far = make(name, 3, sigma=0.03, **options), torch.tensor([3.0, -3.0, 1e6, -1e6], dtype=DOUBLE)
    x = far.expand(500, -1).clone().requires_grad_()
    out = quantizer(x)
    (gx,) = grad(out.sum(), x)
    assert not bool(gx.any())
    ends = torch.tensor([0.75, -1.0, 0.75, -1.0], dtype=DOUBLE)
    assert float((out.detach() - ends).abs().mean(0).max()) < 0.02, "not one of the points at random"


def factor(x: Tensor, alpha: float, sigma: float, low: float, high: float, fuzz: float) -> Tensor:
    """The closed form of the specification, with differences of sigmoids."""
    g = alpha * torch.clamp(torch.round(x / alpha), low, high)

    def borders(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        c = [torch.sigmoid((r - x) / sigma) for r in (left, right)]
        q = [-each * (1 - each) / sigma for each in c]
        return c[1] - c[0], q[1] - q[0]

    ends = torch.full_like(x, (low - 0.5) * alpha), torch.full_like(x, (high + 0.5) * alpha)
    (n, dn), (d, dd) = borders(g - alpha / 2, g + alpha / 2), borders(*ends)
    n, d = n + fuzz, d + (high - low + 1) * fuzz
    return g * (dn * d - n * dd) / d**2


def test_the_closed_form_of_the_most_probable_point() -> None:  # check 3
    quantizer = make("srq", 4)
    x = torch.linspace(-2.6, 2.4, 2001, dtype=DOUBLE).requires_grad_()  # up to 6 sigma beyond the grid
    (gx,) = grad(quantizer(x).sum(), x)
    torch.testing.assert_close(gx, factor(x.detach(), 0.25, 0.09, -8, 7, 1e-6), rtol=1e-9, atol=1e-12)
    zero = x.detach().abs() < 0.125
    assert not bool(gx[zero].any()), "no gradient in the bin of zero"
    centres = 0.25 * torch.tensor([-3.0, -2, -1, 1, 2, 3], dtype=DOUBLE)
    slopes = [grad(quantizer(y := (centres + d).requires_grad_()).sum(), y)[0] for d in (-0.05, 0.0, 0.05)]
    assert float(slopes[1].abs().max()) < 1e-3
    assert bool((slopes[0] * slopes[2] < 0).all()) and float(slopes[0].abs().min()) > 0.05


@pytest.mark.parametrize("estimator", ["srq", "srqall"])
def test_the_derivatives_are_those_of_the_stated_surrogate(estimator: str) -> None:
    x = torch.randn(40, dtype=DOUBLE).clamp(-1.6, 1.4)
    name, options = ESTIMATORS[estimator]
    quantizer = make(name, 3, **options)
    leaf = x.clone().requires_grad_()
    found = derivatives(quantizer, quantizer(leaf), leaf, torch.ones_like(x))
    codes = quantizer.codes(x).double()

    def surrogate(alpha: float, sigma: float) -> Tensor:
        other = make("srq", 3, alpha, sigma)
        points, pi = probabilities(other, x)
        own = pi.gather(-1, (codes + 4).long()[:, None]).squeeze(-1)
        _, start = probabilities(make("srq", 3), x)
        if estimator == "srqall":
            return alpha * (codes + (points * pi).sum(-1) - (points * start).sum(-1)).sum()
        return alpha * (codes * (1 + own - start.gather(-1, (codes + 4).long()[:, None]).squeeze(-1))).sum()

    step = 1e-6
    for name, (da, ds) in {"galpha": (step, 0.0), "gsigma": (0.0, step)}.items():
        difference = (surrogate(0.25 + da, 0.09 + ds) - surrogate(0.25 - da, 0.09 - ds)) / (2 * step)
        close(found[name], difference.detach(), 1e-6)


@pytest.mark.parametrize("noise", ["logistic", "uniform"])
def test_sampling_has_the_derivatives_of_finite_differences(noise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, step = torch.randn(30, dtype=DOUBLE), 1e-6  # check 4
    gumbel = gumbel_noise(torch.empty(30, 8, dtype=DOUBLE))
    monkeypatch.setattr("research.quant.quantizers.rq.gumbel_noise", lambda like: gumbel)
    quantizer = make("rq", 3, temperature=0.7, noise=noise)
    leaf = x.clone().requires_grad_()
    out, parameters = quantizer(leaf), [quantizer.log_scale]
    parameters += [quantizer.log_sigma] if noise == "logistic" else []
    gx, *rest = grad(out.sum(), [leaf, *parameters])
    with torch.no_grad():
        close(gx, (quantizer(x + step) - quantizer(x - step)) / (2 * step), 1e-6)
        for parameter, found in zip(parameters, rest, strict=True):
            ends = []
            for sign in (1, -1):
                parameter += sign * step
                ends.append(quantizer(x).sum())
                parameter -= sign * step
            close(found, (ends[0] - ends[1]) / (2 * step), 1e-6)


def test_cold_samples_and_hard_ones_are_grid_points() -> None:  # check 4
    x = torch.randn(400, dtype=DOUBLE)

    def distance(**options: Any) -> Tensor:
        codes = make("rq", 3, **options)(x) / 0.25
        return (codes - codes.round()).abs().detach()

    assert float(distance(sample="hard").max()) < 1e-12
    assert float(distance(temperature=1e-3).median()) < 1e-6 < 0.01 < float(distance(temperature=1.0).median())
    z = relaxed_choice(torch.randn(50, 8), gumbel_noise(torch.empty(50, 8)), 1e-3)
    assert float((z.amax(-1) > 0.999).float().mean()) > 0.95
    draws = torch.stack([make("rq", 3, sample="hard")(x) for _ in range(2)])
    assert not torch.equal(*draws), "fresh noise in every evaluation"


def test_hard_samples_follow_the_probabilities() -> None:
    quantizer = make("rq", 3, sample="hard")
    x = torch.full((20000,), 0.3, dtype=DOUBLE)
    points, pi = probabilities(quantizer, x[:1])
    drawn = torch.bincount((quantizer(x) / 0.25).round().long() + 4, minlength=8) / len(x)
    assert float((drawn - pi[0].detach()).abs().max()) < 0.015
    assert points[0].tolist() == list(range(-4, 4))


@pytest.mark.parametrize("estimator", ["srq", "srqall"])
def test_without_noise_only_borders_have_a_gradient(estimator: str) -> None:  # check 5
    name, options = ESTIMATORS[estimator]
    quantizer = make(name, 3, sigma=1e-3, **options)
    x = 0.25 * (torch.arange(-3.0, 3.0, dtype=DOUBLE) + torch.tensor([[-0.3], [0.0], [0.3]]))
    _, pi = probabilities(quantizer, x)
    assert float(pi.detach().amax(-1).min()) > 1 - 1e-5
    leaf = x.clone().requires_grad_()
    assert float(grad(quantizer(leaf).sum(), leaf)[0].abs().max()) < 1e-6
    border = torch.tensor([0.25 * 1.4999], dtype=DOUBLE).requires_grad_()
    assert float(grad(quantizer(border).sum(), border)[0].abs().max()) > 10


def test_masses_do_not_underflow_far_from_the_grid() -> None:
    x = torch.tensor([-300.0, -4.0, 4.0, 300.0], requires_grad=True)
    alpha, sigma, low, high = (torch.tensor(value) for value in (0.25, 0.05, -8.0, 7.0))
    noise = Noise(alpha, sigma, 0.0)
    mass = grid_mass(x.detach(), high, high, 1, noise)
    wide = grid_mass(x.detach().double(), high, high, 1, noise)
    close(mass.double(), wide, 1e-5)
    assert float(mass[2]) > 0
    quantizer = make("srq", 4, sigma=0.05).float()
    (gx,) = grad(quantizer(x).sum(), x)
    assert bool(gx.isfinite().all()) and float(gx.abs().max()) < 1e-6, "no gradient to what is clipped"
    assert float(grid_mass(x, low, high, 16, noise).detach().min()) >= 0


def test_stochastic_rounding(case: Case) -> None:  # check 8
    x = case["sr_x_over_alpha"] * 0.25
    quantizer = make("rq", 4, noise="uniform", sample="hard")
    points, pi = probabilities(quantizer, x)
    floor = torch.floor(x / 0.25)[:, None]
    close(pi[points == floor], case["sr_p_floor"], 1e-4)
    close(pi[points == floor + 1], 1 - case["sr_p_floor"], 1e-4)
    exact = stochastic_mass(x[:, None], points, Noise(torch.tensor(0.25), torch.tensor(0.09), 0.0))
    close(exact[points == floor], case["sr_p_floor"])
    many = quantizer(x[:, None].expand(-1, 20000)).mean(1)
    assert float((many.detach() - x).abs().max()) < 0.01 * 0.25 * 3, "unbiased"
    outside = quantizer(torch.tensor([100.0, -100.0], dtype=DOUBLE))
    close(outside, 0.25 * torch.tensor([7.0, -8.0], dtype=DOUBLE))


@pytest.mark.parametrize("name", ["rq", "srq"])
def test_more_than_four_bits_look_at_the_nearest_points(name: str) -> None:
    options = {"mcste": "all_classes"} if name == "srq" else {}
    quantizer = make(name, 8, sigma=0.25 / 3, **options)
    x = (5 * torch.randn(300, dtype=DOUBLE)).requires_grad_()
    expected = quantizer.expected_codes(x, torch.round(quantizer.transform(x).detach()), quantizer.noise_for(x))
    points, pi = probabilities(quantizer, x)
    assert points.shape[-1] == 256 and quantizer.points == 16
    close(expected, (points * pi).sum(-1).detach(), 0.02)
    assert float((quantizer(x) / 0.25).detach().abs().max()) <= 128


def test_the_range_starts_from_data_and_the_noise_from_the_range() -> None:
    x = torch.randn(2000, dtype=DOUBLE)
    for init in ("mse", "minmax"):
        spec = QuantizerSpec("srq", 3, init=init)
        quantizer = build_quantizer(spec, (2000,), 0, "weight").double()
        quantizer.initialise(x)
        plain = build_quantizer(QuantizerSpec("lsq", 3, init=init), (2000,), 0, "weight").double()
        plain.initialise(x)
        close(quantizer.scale, plain.scale.detach())
        close(quantizer.sigma, quantizer.scale.detach() / 3, 1e-6)
        assert torch.equal(quantizer.codes(x), plain.codes(x))


def test_the_noise_has_a_floor_that_gives_the_step_no_gradient() -> None:
    quantizer = make("srq", 3, sigma=1e-9, sigma_floor=0.05)
    close(quantizer.sigma, 0.05 * quantizer.scale.detach(), 1e-6)
    assert grad(quantizer.sigma, [quantizer.log_scale, quantizer.log_sigma], allow_unused=True)[0] is None


def test_gradients_of_the_range_are_multiplied_by_the_factor_of_lsq() -> None:
    x = torch.randn(50, dtype=DOUBLE)
    for name in ("rq", "srq"):
        found = []
        for factor in (True, False):
            quantizer = make(name, 3, gradient_factor=factor).eval()
            found.append(torch.stack(grad(quantizer(x).sum(), [quantizer.log_scale, quantizer.log_sigma])))
        close(found[0], found[1] / (50 * 3) ** 0.5, 1e-6)


def test_temperatures_by_width() -> None:
    assert [make("rq", bits).temperature for bits in (1, 2, 3, 8)] == [1.0, 1.0, 0.5, 0.5]
    assert isinstance(quantizer := make("rq", 8, temperature=2.0), RQ) and quantizer.temperature == 2.0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rq", {"temperature": 0.0}, "temperature=0.0: use more than 0"),
        ("rq", {"sample": "soft"}, "sample=soft: use one of relaxed, hard"),
        ("rq", {"noise": "gauss"}, "noise=gauss: use one of logistic, uniform"),
        ("srq", {"mcste": "some"}, "mcste=some: use one of argmax_only, all_classes"),
        ("srq", {"fuzz": 0.0}, "fuzz=0.0: use a small number"),
        ("srq", {"sigma_floor": 0.5}, "sigma_start=.*sigma_floor=0.5: use parts of the step"),
        ("srq", {"tau": 0.5}, "srq says"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^quantizer\.weight\.options.*{message}"):
        make(name, 3, **options)
