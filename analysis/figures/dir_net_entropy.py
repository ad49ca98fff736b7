"""Information in binary weights: ``python -m analysis.figures.dir_net_entropy runs=GLOB [layer=NAME]``.

Left: latent weights of one layer in front of the sign. Right: entropy of the codes, layer by layer: of the balanced
weights as they are deployed (Libra), and of the plain signs of the same latent weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from analysis.collect import Row
from analysis.distributions import BIN, density, distributions
from analysis.figures.base import Drawn, NoData, figure_script, panels, styles
from analysis.figures.dir_net_estimator import binary_runs, estimator
from analysis.labels import setting

INNER = "layer3.0.conv2"
BALANCED, PLAIN = "balanced (deployed)", "plain sign of the latent weights"


def entropy(share: float) -> float:
    """Bits of a code that is 1 with probability ``share``."""
    return -sum(p * math.log2(p) for p in (share, 1 - share) if p > 0)


def positive(data: dict[str, Any]) -> float:
    """Share of latent weights above zero, from their histogram, whose bins have zero as a border."""
    edges, dense = density(data["histogram"])
    return sum(BIN * value for left, value in zip(edges[:-1], dense, strict=True) if left > -BIN / 2)


def draw(rows: Sequence[Row], layer: str = INNER) -> Drawn:
    """Of the run whose estimator does the most, its first seed.

    Args:
        rows: of binary runs.
        layer: whose histogram is drawn.
    """
    row = max(binary_runs(rows), key=lambda one: (estimator(one) != "constant", -one["seed"]))
    layers = {name: slots["weight"] for name, slots in (distributions(row) or {}).items() if "codes" in slots["weight"]}
    if not layers:
        raise NoData("no run of quantizer=binary with distributions")
    if layer not in layers:
        raise ValueError(f"layer={layer}: no layer with binary weights; use one of {', '.join(layers)}")
    figure, (left, right) = panels(1, 2, height=3.3)
    edges, dense = density(layers[layer]["histogram"], merge=2)
    left.stairs(dense, edges, fill=True, color="0.75", label="latent weights")
    left.axvline(0, ymax=0.65, color="0.2", lw=0.8, ls="--", label="threshold of the plain sign")
    left.set_xlabel("latent weight / root mean square of its filter")
    left.set_ylabel("density")
    left.set_title(f"{setting(row)}\n{layer}")
    left.set_ylim(0, 1.6 * max(dense))
    left.legend(loc="upper right")
    look = styles((BALANCED, PLAIN))
    found = {
        BALANCED: [entropy(data["share"][-1]) for data in layers.values()],
        PLAIN: [entropy(positive(data)) for data in layers.values()],
    }
    for name, values in found.items():
        right.plot(range(len(layers)), values, label=name, **look[name])
    right.set_xticks(range(len(layers)), list(layers), rotation=90)
    right.set_xlabel("layer")
    right.set_ylabel("entropy of a weight's\ncode (bits)")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    table = [(name, key, value) for name, values in found.items() for key, value in zip(layers, values, strict=True)]
    return Drawn(figure, ("form", "layer", "entropy_bits"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
