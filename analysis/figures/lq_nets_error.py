"""Quantization error by width, LQ-Nets beside LSQ: ``python -m analysis.figures.lq_nets_error runs=GLOB``.

Mean squared error over mean square of a layer's latent weights, and of its inputs on test images, at the end of
training: mean over the layers of at most 4 bits (line) and every layer (small dots).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from matplotlib.ticker import LogLocator, NullFormatter

from analysis.collect import Row
from analysis.columns import widths
from analysis.distributions import distributions
from analysis.figures.base import Drawn, NoData, figure_script, panels, styles
from analysis.labels import method_name

METHODS = ("LSQ", "LQ-Nets")
SLOTS = ("weight", "input")


def errors(rows: Sequence[Row], slot: str) -> dict[str, dict[int, dict[str, float]]]:
    """Relative error by method, width and layer, of the first run of each method and width."""
    place = SLOTS.index(slot)
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in METHODS}
    network = next((row["model"], row["data"]) for row in rows if method_name(row) == "LQ-Nets")
    for row in rows:
        name, stated = method_name(row), widths(row)
        if name not in METHODS or (row["model"], row["data"]) != network or stated is None:
            continue
        bits = stated[place]
        if bits in found[name]:
            continue
        layers = distributions(row) or {}
        inner = {layer: slots[slot]["error"] for layer, slots in layers.items() if "codes" in slots[slot]}
        if inner:
            found[name][bits] = inner
    return found


def draw(rows: Sequence[Row]) -> Drawn:
    """Error over width, for weights and inputs."""
    if not any(method_name(row) == "LQ-Nets" for row in rows):
        raise NoData("no run of quantizer=lq_nets")
    figure, axes = panels(1, 2)
    look, table = styles(METHODS), []
    for axis, slot in zip(axes, SLOTS, strict=True):
        for label, by_width in errors(rows, slot).items():
            bits = sorted(by_width)
            if not bits:
                continue
            axis.plot(bits, [mean(by_width[b].values()) for b in bits], label=label, **look[label])
            for b in bits:
                shifted = [b + (0.06 if label == METHODS[0] else -0.06)] * len(by_width[b])
                axis.plot(shifted, list(by_width[b].values()), ".", color=look[label]["color"], markersize=2.5)
                table += [(label, slot, b, name, error) for name, error in by_width[b].items()]
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_xticks(sorted({b for _, s, b, *_ in table if s == slot}))
        axis.set_xlabel(f"bits of the {slot}")
        axis.set_ylabel(f"relative squared error of the {slot}")
        axis.legend()
    if not table:
        raise NoData("no run of quantizer=lq_nets or lsq with distributions")
    return Drawn(figure, ("method", "slot", "bits", "layer", "relative_squared_error"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
