"""What lowers the bits: the quantization-error regulariser, and a hinge on the expected cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from callbacks.sdq.formulas import Weighting, error_weight, mixture
from callbacks.sdq.quantizer import StochasticWidth
from research.quant.allocation import Allocation, LayerBits
from research.quant.budget import Budget, Counts
from research.quant.cost_table import CostTable
from research.quant.quantizers import Quantizer


@torch.no_grad()
def squared_error(quantizer: Quantizer, w: Tensor) -> Tensor:
    """``QE_b``: summed squared rounding error of the weight ``w``, in units of half the grid's range; 0-dim.

    Rounding alone: clipped weights, and what a quantizer makes of a weight in front of rounding, do not count. DoReFa's
    grid is [-1, 1], so that this is the distance of ``tanh(w) / max|tanh w|`` from its level.
    """
    qmin, qmax = quantizer.limits()
    reach = quantizer.scale_for(w) * (qmax - qmin) / 2
    error = quantizer.fake_quantize(w, rounding=False) - quantizer.fake_quantize(w)
    return (error / reach).square().sum()


def qer(certainty: Tensor, pairs: Sequence[tuple[StochasticWidth, Tensor]], weighting: Weighting) -> Tensor:
    """``sum_l beta_l a_hi QE_hi + (1 - beta_l) a_lo QE_lo``, 0-dim; its gradient reaches the probabilities alone.

    The paper's own form is not known to us. With all ``a_b = 1`` (``expected``) fewer bits always cost more; with
    ``weighted``, see `error_weight`, each bit of a weight costs about a third of the weight's share of all weights.

    Args:
        certainty: probability of the higher width, (layers,).
        pairs: by layer the quantizer and the weight.
        weighting: ``weighted`` or ``expected``.
    """
    total = sum(w.numel() for _, w in pairs)
    rows = []
    for coin, w in pairs:
        for quantizer in (coin.higher, coin.lower):
            error = squared_error(quantizer, w.detach())
            rows.append(error * error_weight(quantizer.bits, total) if weighting == "weighted" else error)
    higher, lower = torch.stack(rows).reshape(-1, 2).T
    return mixture(certainty, higher, lower).sum()


def size_hinge(
    certainty: Tensor,
    pairs: Mapping[str, tuple[Quantizer, Quantizer]],
    present: Allocation,
    counts: Counts,
    budgets: Sequence[Budget],
) -> Tensor:
    """``sum_budgets max(0, expected cost / budget - 1)``, 0-dim; budgets that are no sum over layers are left to the
    end of the search, as widths of weights have no part in them.

    Args:
        certainty: probability of the higher width of the layers in ``pairs``, (layers,).
        pairs: by layer the quantizers of the higher and of the lower width.
        present: widths of all layers.
        counts: the network's.
        budgets: what the expected cost is held against.
    """
    choices = {name: [bits] for name, bits in present.items()}
    for name, pair in pairs.items():
        choices[name] = [LayerBits(int(quantizer.bits), present[name].input) for quantizer in pair]
    budgets = [budget for budget in budgets if budget.additive]
    if not budgets:
        return certainty.new_zeros(())
    table = CostTable.of(budgets, counts, choices, list(pairs)).to(certainty)
    expected = mixture(certainty, *table.shares.unbind(2)).sum(1) + table.others
    return torch.relu(expected / table.limits - 1).sum()
