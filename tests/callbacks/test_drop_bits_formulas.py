"""DropBits' formulas: vectors derived from its equations, and the cheap checks of its specification."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import grad

from callbacks.drop_bits.formulas import (
    GAMMA,
    TAU,
    ZETA,
    Levels,
    hard_concrete,
    kept_bits,
    mask_of,
    masked_mass,
    most_probable,
    nested,
    nonzero_logit,
    odds_against,
)
from callbacks.drop_bits.quantizer import DroppedBits
from research.quant.grid import code_limits
from research.quant.quantizers import QuantizerSpec, build_quantizer
from research.quant.quantizers.srq import SRQ
from research.quant.relaxed_grid import Noise, grid_mass

DOUBLE = torch.float64
ALPHA, SIGMA = 0.25, 0.09
NOISE = Noise(torch.tensor(ALPHA, dtype=DOUBLE), torch.tensor(SIGMA, dtype=DOUBLE), 1e-6)
Case = dict[str, Tensor]


@pytest.fixture
def case(golden: Callable[[str], dict[str, np.ndarray]]) -> Case:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in golden("srq").items()}


def levels(masks: Tensor, signed: bool = True, narrow: bool = False) -> Levels:
    bits = torch.arange(1.0, len(masks) + 1)
    return Levels(*code_limits(bits, torch.tensor(signed), narrow), masks)


def dropped(bits: int, role: str = "weight", mcste: str = "argmax_only", fuzz: float = 1e-6) -> DroppedBits:
    """A quantizer that drops bits, in training, nothing drawn yet."""
    spec = QuantizerSpec(
        "srq", bits, options={"sigma_floor": 0.0, "gradient_factor": False, "mcste": mcste, "fuzz": fuzz}
    )
    source = build_quantizer(spec, (), None, role)  # type: ignore[arg-type]
    assert isinstance(source, SRQ)
    found = DroppedBits(source, bits, 0.9, True).double()
    found.log_scale.data.fill_(ALPHA).log_()
    found.log_sigma.data.fill_(SIGMA).log_()
    return found


def with_masks(quantizer: DroppedBits, masks: list[float], monkeypatch: pytest.MonkeyPatch) -> DroppedBits:
    """The quantizer with these masks, nested already."""
    fixed = quantizer.levels()._replace(masks=torch.tensor(masks, dtype=DOUBLE))
    monkeypatch.setattr(quantizer, "levels", lambda: fixed)
    return quantizer


def masked(x: Tensor, of: Levels) -> tuple[Tensor, Tensor]:
    """All codes and their probabilities, by definition."""
    points = torch.arange(float(of.low[-1]), float(of.high[-1]) + 1, dtype=DOUBLE)
    masses = mask_of(points, of) * grid_mass(x[..., None], points, points, 1, NOISE)
    return points, masses / masses.sum(-1, keepdim=True)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=tolerance, atol=1e-12)


def test_golden_levels_and_masked_probabilities(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    bits = int(case["bits"])
    level = sum(
        mask_of(case["grid_int"], levels((torch.arange(1, bits + 1) <= k).double())) for k in range(1, bits + 1)
    )
    assert torch.equal(bits + 1 - level, case["level_of_gridpoint"].double())
    of = levels(case["level_mask"][1:])
    assert (float(case["alpha"]), float(case["sigma"])) == (ALPHA, SIGMA)
    close(masked(case["x"], of)[1], case["drop_pi"])

    quantizer = with_masks(dropped(bits, fuzz=float(case["fuzz"])), case["level_mask"][1:].tolist(), monkeypatch)
    x = case["x"].clone().requires_grad_()
    out = quantizer(x)
    close(out, case["drop_out"])
    gx, log_alpha, log_sigma = grad((out * case["gout"]).sum(), [x, quantizer.log_scale, quantizer.log_sigma])
    close(gx, case["drop_gx"], 1e-9)
    close(log_alpha / ALPHA, case["drop_galpha"], 1e-9)
    close(log_sigma / SIGMA, case["drop_gsigma"], 1e-9)


def test_golden_hard_concrete(case: Case) -> None:
    assert case["hc_tau_gamma_zeta"].tolist() == pytest.approx([TAU, GAMMA, ZETA])
    log_a = case["hc_logalpha"].clone().requires_grad_()
    z = hard_concrete(log_a, case["hc_u"])
    close(z, case["hc_z"])
    close(grad(z.sum(), log_a)[0], case["hc_gz"])
    close(torch.sigmoid(nonzero_logit(log_a)), case["hc_p_nonzero"])


@pytest.mark.parametrize("signed", [True, False])
def test_all_masks_on_and_the_highest_off(signed: bool) -> None:  # check 6
    x = torch.randn(200, dtype=DOUBLE)

    def plain(bits: int) -> tuple[Tensor, Tensor]:
        low, high = code_limits(torch.tensor(float(bits)), torch.tensor(signed))
        points = torch.arange(float(low), float(high) + 1, dtype=DOUBLE)
        masses = grid_mass(x[:, None], points, points, 1, NOISE)
        return points, masses / masses.sum(-1, keepdim=True)

    close(masked(x, levels(torch.ones(4, dtype=DOUBLE), signed))[1], plain(4)[1])
    points, pi = masked(x, levels(nested(torch.tensor([1.0, 1.0, 0.0], dtype=DOUBLE)), signed))
    kept, expected = plain(3)
    inside = (points >= kept[0]) & (points <= kept[-1])
    close(pi[:, inside], expected)
    assert not bool(pi[:, ~inside].any())
    points, pi = masked(x, levels(nested(torch.tensor([0.0, 1.0, 1.0], dtype=DOUBLE)), signed))
    assert points[pi.sum(0) > 0].tolist() == ([-1, 0] if signed else [0, 1]), "nested: nothing above a dropped level"


@pytest.mark.parametrize("narrow", [False, True])
def test_closed_forms_are_those_of_the_whole_grid(narrow: bool) -> None:
    x = 1.2 * torch.randn(3000, dtype=DOUBLE)
    for masks in ([1.0, 0.8, 0.3, 0.3], [1.0, 1.0, 0.2, 0.0], [1.0, 1e-3, 1e-3, 1e-5], [1.0, 1.0, 1.0, 1.0]):
        of = levels(torch.tensor(masks, dtype=DOUBLE), narrow=narrow)
        points, pi = masked(x, of)
        single = mask_of(points, of) * grid_mass(x[:, None], points, points, 1, NOISE)
        close(masked_mass(x, of, NOISE), single.sum(-1))
        codes = most_probable(x, of, NOISE)
        close(pi.gather(-1, (codes - points[0]).long()[:, None]).squeeze(-1), pi.amax(-1))


@pytest.mark.parametrize("mcste", ["argmax_only", "all_classes"])
@pytest.mark.parametrize("role", ["weight", "input"])
def test_with_all_masks_on_it_is_srq_at_every_width(role: str, mcste: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = 0.7 * torch.randn(500, dtype=DOUBLE)
    for bits in (1, 2, 3):
        quantizer = with_masks(dropped(3, role, mcste), [1.0 if k < bits else 0.0 for k in range(3)], monkeypatch)
        plain = quantizer.plain()
        plain.bits.fill_(bits)
        results = []
        for each in (quantizer, plain):
            leaf = x.clone().requires_grad_()
            out = each(leaf)
            results.append((out, *grad(out.square().sum(), [leaf, each.log_scale, each.log_sigma])))
        for mine, expected in zip(*results, strict=True):
            close(mine, expected, 1e-8)


def test_probabilities_of_the_masks() -> None:  # check 7
    u = torch.rand(200000, dtype=DOUBLE)
    for log_a in torch.tensor([-3.0, 0.0, 2.2], dtype=DOUBLE):
        z = hard_concrete(log_a, u)
        assert float((z == 0).double().mean()) > 0 and float((z == 1).double().mean()) > 0
        expected = float(torch.sigmoid(nonzero_logit(log_a)))
        assert float((z != 0).double().mean()) == pytest.approx(expected, abs=0.01)


def test_log_a_learns_from_the_value_and_nothing_else_in_evaluation() -> None:
    quantizer = dropped(3)
    quantizer.noise.copy_(torch.tensor([0.1, 0.1], dtype=DOUBLE))
    x = 0.5 * torch.randn(500, dtype=DOUBLE)
    masks = quantizer.levels().masks
    assert bool(((masks[1:] > 0) & (masks[1:] < 1)).all())
    (found,) = grad(quantizer(x).sum(), quantizer.log_a)
    assert bool((found != 0).all())
    quantizer.eval()
    assert torch.equal(quantizer(x), quantizer.plain()(x))
    assert grad(quantizer(x).sum(), quantizer.log_a, allow_unused=True) == (None,)
    quantizer.train().decided.fill_(True)
    quantizer.bits.fill_(2)
    assert quantizer.levels().masks.tolist() == [1, 1, 0]
    assert not bool(grad(quantizer(x).sum(), quantizer.log_a)[0].any())
    assert float(quantizer.expected_bits.detach()) == 2


def test_the_width_is_the_highest_level_without_a_gap() -> None:
    assert [kept_bits(logits) for logits in ([1, 1, 1], [1, -1, 1], [-1, 5, 5], [2, 2, -0.1])] == [4, 2, 1, 3]
    p = torch.tensor([0.9, 0.3, 0.6], dtype=DOUBLE)
    expected = [0.1, 0.9 * 0.7, 0.9 * 0.3 * 0.4, 0.9 * 0.3 * 0.6]
    quantizer = dropped(4)
    quantizer.log_a.data.copy_(torch.logit(p) + TAU * np.log(-GAMMA / ZETA))
    assert float(quantizer.expected_bits.detach()) == pytest.approx(sum(k * v for k, v in enumerate(expected, start=1)))


def test_the_odds_against_dropping_grow_with_every_level() -> None:
    p = torch.tensor([0.9, 0.6, 0.7, 0.2], dtype=DOUBLE)
    logits = torch.logit(p)
    present = kept_bits(logits.tolist())
    assert present == 4
    odds = [0.9 / 0.1, 0.6 / 0.4, 0.7 / 0.3]
    expected = [np.log(odds[0] * odds[1] * odds[2]), np.log(odds[1] * odds[2]), np.log(odds[2]), 0]
    assert odds_against(logits, present) == pytest.approx(expected)
    assert odds_against(logits, 1) == [0.0]


def test_masks_are_nested() -> None:
    masks = nested(torch.tensor([0.5, 0.0, 1.0]))
    assert masks.tolist() == [1, 0.5, 0, 0]
    assert all(before >= after for before, after in pairwise(nested(torch.rand(6)).tolist()))
