"""What runs are called in figures and beside measurements."""

from __future__ import annotations

from analysis.columns import weight_quantizer, widths, widths_from
from analysis.rows import Row

MEASURING = ("bin_occupancy", "curvature_probe", "oscillation_tracker", "weight_flips")
"""Mechanics that change nothing: no part of a method's name."""

NAMES = {
    "lsq": "LSQ", "lsq_plus": "LSQ+", "ewgs": "EWGS", "pact": "PACT", "dorefa": "DoReFa", "n2uq": "N2UQ",
    "lq_nets": "LQ-Nets", "liq": "LIQ", "minmax": "min-max", "binary": "binary", "sam": "SAM", "grad_l1": "GRAD-L1",
    "hero": "HERO", "kurtosis": "KURE", "saq": "SAQ", "noise_tempering": "noise tempering", "dir_net": "DIR-Net",
    "distillation": "distillation", "bin_regularization": "bin regularization",
    "oscillation_dampening": "dampening", "oscillation_freezing": "freezing", "bmpq": "BMPQ", "csq": "CSQ",
    "sdq": "SDQ", "bsq": "BSQ", "constrained": "constrained", "edge_mpq": "Edge-MPQ", "ssps": "SSPS", "samq": "SAMQ",
    "drop_bits": "DropBits", "srq": "SRQ", "rq": "RQ",
}  # fmt: skip


def method_name(row: Row) -> str:
    """Name of a run's method: ``LSQ + distillation``; of a float run its mechanics, or ``SGD``."""
    quantizer = weight_quantizer(row["config"])
    mechanics = [NAMES.get(slug, slug) for slug in row["mechanics"] if slug not in MEASURING]
    if quantizer == "float":
        return " + ".join(mechanics) or "SGD"
    return " + ".join([NAMES.get(quantizer, quantizer), *(name for name in mechanics if name != NAMES.get(quantizer))])


def widths_name(row: Row) -> str:
    """``W4A4``, ``float``, or ``widths from`` what chose them."""
    found = widths(row)
    if found is None:
        return f"widths from {widths_from(row)}"
    return "float" if found[0] == 32 else f"W{found[0]}A{found[1]}"


def setting(row: Row) -> str:
    """What runs must share to be compared: network, data, widths and epochs, in words."""
    return f"{row['model']}, {row['data']}, {widths_name(row)}, {row['epochs']} epochs"
