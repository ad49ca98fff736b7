"""Layer selection: which layers keep a high precision, by their multipliers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from research.quant.allocation import Allocation, LayerBits
from research.quant.budget import Budget, Counts
from research.quant.ilp import allocate
from research.quant.recipe import FLOAT_BITS


def candidates(present: Allocation, constrained: Sequence[str], high_bits: int) -> dict[str, list[LayerBits]]:
    """The widths that every layer can have: those it has and, for constrained layers with less, ``high_bits``.

    Weight and input go up together; a slot without a quantizer stays as it is.

    Args:
        present: the widths of the search.
        constrained: names of the layers with a multiplier.
        high_bits: width of a layer in high precision.
    """
    found = {}
    for name, bits in present.items():
        options = [bits]
        if name in constrained and bits.weight < high_bits:
            inputs = bits.input if bits.input == FLOAT_BITS else max(bits.input, high_bits)
            options.append(LayerBits(high_bits, inputs))
        found[name] = options
    return found


def ranked(duals: Mapping[str, float]) -> list[str]:
    """Layers by multiplier, the largest first; equal ones in order of definition."""
    return sorted(duals, key=lambda name: -duals[name])


def largest(duals: Mapping[str, float], choices: Mapping[str, Sequence[LayerBits]], keep: int) -> Allocation:
    """The ``keep`` selectable layers with the largest multipliers in high precision, all others as they are (paper)."""
    kept = [name for name in ranked(duals) if len(choices[name]) > 1][:keep]
    return Allocation({name: options[-1] if name in kept else options[0] for name, options in choices.items()})


def within(
    duals: Mapping[str, float], choices: Mapping[str, Sequence[LayerBits]], counts: Counts, budgets: Sequence[Budget]
) -> Allocation:
    """The layers in high precision for which the multipliers of all others sum to the least within the budgets.

    With layers of equal cost these are those with the largest multipliers; a reconstruction of how the ranking meets a
    budget.
    """
    sensitivities = {
        name: {bits: duals[name] if len(options) > 1 and bits == options[0] else 0.0 for bits in options}
        for name, options in choices.items()
    }
    return allocate(sensitivities, counts, budgets)
