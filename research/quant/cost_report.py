"""The cost of a network as plain numbers for a run's summary, and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from research.quant.activation_memory import peak_memory
from research.quant.cost import (
    apply_convention,
    average_activation_bits,
    average_weight_bits,
    bops,
    compression,
    count_norm_parameters,
    input_memory,
    kibibytes,
    measure,
    megabytes,
    relative_bops,
    size_bits,
)
from research.quant.cost_convention import CostConvention


def cost_report(
    net: nn.Module,
    input_shape: Sequence[int],
    first: str,
    last: str,
    convention: CostConvention | None = None,
) -> dict[str, Any]:
    """Every cost of ``net`` at its hard bits.

    Args:
        net: a network, float or converted.
        input_shape: shape of one sample, (C, H, W), at the real size.
        first, last: names of the layer that reads the image and of the one that writes the logits.
        convention: what counts how; ``CostConvention()`` if None.

    Returns:
        Plain numbers by name, and ``convention``, a dictionary. ``bops_inner`` leaves the first and the last layer out,
        ``*_all`` sizes count biases, batch-norms and ranges too. Memory is in bits for one sample:
        ``activation_sum_bits`` counts a tensor once per layer that reads it, ``activation_peak_bits`` is of the whole
        network, whatever is excluded.
    """
    convention = convention or CostConvention()
    measured = measure(net, input_shape)
    layers = apply_convention(measured, convention, first, last)
    inner = apply_convention(measured, replace(convention, first_last="excluded"), first, last)
    whole = replace(convention, first_last="all") if convention.first_last == "excluded" else convention
    present = apply_convention(measured, replace(whole, shortcut="counted"), first, last)
    norms = count_norm_parameters(net)
    size = size_bits(layers, convention.count_biases, convention.count_ranges, norms if convention.count_norms else 0)
    size_all = size_bits(layers, True, True, norms)
    numbers: dict[str, Tensor | float] = {
        "macs": sum(layer.macs for layer in layers),
        "bops": bops(layers, convention.form),
        "bops_inner": bops(inner, convention.form),
        "relative_bops": relative_bops(layers, convention.form),
        "weights": sum(layer.weights for layer in layers),
        "size_bits": size,
        "size_bits_all": size_all,
        "size_mb": megabytes(size),
        "size_kib": kibibytes(size),
        "size_kib_all": kibibytes(size_all),
        "weight_bits": average_weight_bits(layers),
        "weight_bits_layer_mean": average_weight_bits(layers, weighted=False),
        "activation_bits": average_activation_bits(layers),
        "compression": compression(layers),
        "activation_sum_bits": input_memory(layers, "sum"),
        "activation_max_bits": input_memory(layers, "max"),
        "activation_peak_bits": peak_memory(net, input_shape, present),
    }
    plain: dict[str, Any] = {key: value if isinstance(value, int) else float(value) for key, value in numbers.items()}
    return {**plain, "convention": convention.plain()}


def format_cost(report: Mapping[str, Any]) -> str:
    """A report as aligned text, a number a line, its convention last."""
    rows = {key: value for key, value in report.items() if key != "convention"}
    width = max(len(key) for key in rows)
    lines = [f"{key.ljust(width)}  {value:,.6g}" if isinstance(value, float) else f"{key.ljust(width)}  {value:,}"
             for key, value in rows.items()]  # fmt: skip
    stated = ", ".join(f"{key}={value}" for key, value in report["convention"].items())
    shared = "a tensor counts once for each layer that reads it, at the peak once in all"
    return "\n".join([*lines, f"convention: {stated}; {shared}"])
