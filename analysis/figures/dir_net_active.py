"""Share of weights that keep a gradient: ``python -m analysis.figures.dir_net_active runs=GLOB``.

By estimator, over epochs: mean over layers (line) and range over layers (band), mean over seeds. DTE is a
reconstruction, see docs/methods/dir_net.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from analysis.collect import Row
from analysis.figures.base import Curve, Drawn, NoData, by_label, curve, figure_script, panels, plot_curve, styles
from analysis.figures.dir_net_estimator import SLUG, binary_runs, estimator
from analysis.labels import setting
from analysis.rows import label

ORDER = ("constant", "EDE (IR-Net)", "DTE (reconstruction)")
METRIC = f"{SLUG}/active_share/"


def draw(rows: Sequence[Row]) -> Drawn:
    """A line with a band per estimator."""
    groups = by_label(binary_runs(rows), estimator, ORDER)
    figure, (axis,) = panels(1, 1, width=4.4)
    look, table = styles(ORDER), []
    for name, group in groups.items():
        layers = sorted({m.name for m in group[0]["run"].history() if m.name.startswith(METRIC)})
        curves = [curve(group, layer, 100) for layer in layers]
        if not curves:
            raise NoData(f"no {METRIC}* in {label(group[0])}")
        by_epoch = list(zip(*(found.mean for found in curves), strict=True))
        found = Curve(
            curves[0].x,
            [mean(shares) for shares in by_epoch],
            [min(shares) for shares in by_epoch],
            [max(shares) for shares in by_epoch],
        )
        plot_curve(axis, found, look[name], name)
        table += [(name, *values) for values in zip(*found, strict=True)]
    axis.set_ylim(0, 105)
    axis.set_xlabel("epochs done")
    axis.set_ylabel("weights that keep a gradient (%),\nline: mean, band: range over layers")
    axis.set_title(setting(next(iter(groups.values()))[0]))
    axis.legend()
    return Drawn(figure, ("estimator", "epoch", "mean_percent", "least_percent", "greatest_percent"), table)


if __name__ == "__main__":
    figure_script(draw, __file__)
