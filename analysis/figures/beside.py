"""Quantized runs with one mechanic, and those of the same quantizer and setting without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from analysis.collect import Row
from analysis.figures.base import by_label, comparable
from analysis.labels import NAMES, method_name, setting


def with_and_without(
    rows: Sequence[Row], slug: str, name: Callable[[Row], str] = method_name, order: Sequence[str] = ()
) -> dict[str, list[Row]]:
    """Runs by name, those without the mechanic first.

    Args:
        rows: deployments.
        slug: of the mechanic.
        name: what runs are called.
        order: of the names; the quantizer's name first where it says nothing.

    Raises:
        NoData: no quantized run with this mechanic alone.
    """
    own = comparable(rows, f"callbacks=[{slug}]", lambda row: method_name(row).split(" + ")[1:] == [NAMES[slug]])
    quantizer = method_name(own[0]).split(" + ")[0]
    alike = [
        row for row in rows if setting(row) == setting(own[0]) and method_name(row) in (quantizer, method_name(own[0]))
    ]
    return by_label(alike, name, order or (quantizer,))
