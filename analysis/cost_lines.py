"""What each mechanic costs, into its method card: ``python -m analysis.cost_lines``.

A card's paragraph that ends with ``<!-- cost: SLUG -->`` is written anew from the record of `analysis.mechanic_cost`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis.cli import script
from analysis.mechanics import CARDS, measured
from research.runs.files import atomic_write_text

MARK = re.compile(r"^.*<!-- cost: (\w+) -->$", re.MULTILINE)


def line(slug: str, mechanics: Mapping[str, Any]) -> str:
    """The paragraph of one mechanic, its mark included.

    Raises:
        ValueError: it was not measured.
    """
    if slug not in mechanics:
        raise ValueError(f"cost: {slug} has not been measured; run python -m analysis.mechanic_cost")
    cost = mechanics[slug]
    forwards = f"{cost['forwards']} forward pass{'es' if cost['forwards'] != 1 else ''} a step"
    return (
        f"Measured: {slug}, {forwards}, {cost['ratio']:.2f} times the time and "
        f"{cost['memory']:.2f} times the kept memory of plain training ([how](../mechanics.md)). "
        f"<!-- cost: {slug} -->"
    )


def renewed(card: str, mechanics: Mapping[str, Any]) -> str:
    """The text of a card with all its cost lines as the record has them."""
    return MARK.sub(lambda found: line(found[1], mechanics), card)


def main(cards: str) -> None:
    """Write the cost lines of all cards of a folder anew."""
    mechanics = measured()["mechanics"]
    for path in sorted(Path(cards).glob("*.md")):
        text = path.read_text()
        if MARK.search(text):
            atomic_write_text(path, renewed(text, mechanics))


if __name__ == "__main__":
    script(main, {"cards": str(CARDS)})
