"""Which kept measurements figures of flatness show, and the numbers that figures of oscillation take from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from analysis.collect import Row, collect
from analysis.figures.base import NoData, panels, styles
from analysis.figures.curvature import draw_curvature
from analysis.figures.flatness import kept, plot_sharpness, spread
from analysis.figures.oscillation_dampening_latent import FOLDS, distances
from analysis.figures.oscillation_freezing_batchnorm import before_and_after
from analysis.figures.oscillation_tracker_counts import at_least
from research.runs.folder import RunFolder
from tests.analysis.run_folders import keep_measurement, write_run

BALL = {"deployment": "final", "form": "worst", "norm": "plain", "images": 8}


def only(folder: RunFolder) -> Row:
    (row,) = collect(str(folder.path))
    return row


def test_measurements_of_the_settings_that_most_runs_share(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, 0.8, seed) for seed in (0, 1)]
    for folder in folders:
        for rho in (0.2, 0.1):
            keep_measurement(folder, "sharpness", {**BALL, "rho": rho}, {"rise": rho})
    for norm, images in (("plain", 16), ("filter", 8)):
        odd = {**BALL, "rho": 0.1, "norm": norm, "images": images}
        keep_measurement(folders[0], "sharpness", odd, {"rise": 7.0})
    keep_measurement(folders[0], "sharpness", {**BALL, "rho": 0.1, "deployment": "other"}, {"rise": 8.0})
    keep_measurement(folders[0], "landscape", BALL, {})
    groups = {"first": [only(folders[0])], "second": [only(folders[1])]}
    found = kept(groups, "sharpness", ("rho",), norm="plain")
    assert {name: [[r["values"]["rise"] for r in run] for run in runs] for name, runs in found.items()} == {
        "first": [[0.1, 0.2]],
        "second": [[0.1, 0.2]],
    }
    assert kept(groups, "sharpness", ("rho",), norm="filter").keys() == {"first"}
    figure, (axis,) = panels(1, 1)
    assert plot_sharpness(axis, found, styles(found))[1] == ("first", 0.2, 0.2, 0.2, 0.2)
    with pytest.raises(NoData, match=r"no measurement of first, second: python -m analysis\.curvature"):
        kept(groups, "curvature")


def test_the_spread_of_seeds_at_each_position() -> None:
    found = spread([{0.0: 1.0, 1.0: 4.0}, {1.0: 6.0}])
    assert found == ([0.0, 1.0], [1.0, 5.0], [1.0, 4.0], [1.0, 6.0])


@pytest.mark.parametrize("converged", [True, False])
def test_what_has_not_converged_is_marked(tmp_path: Path, converged: bool) -> None:
    folder = write_run(tmp_path, 0.8)
    values = {
        "eigenvalues": [{"value": 3.0, "residual": 0.1, "converged": converged}],
        "trace": {"value": 9.0, "standard_error": 1.0},
    }
    settings = {"deployment": "final", "surface": "quantized", "operator": "hessian", "images": 8, "seed": 0}
    keep_measurement(folder, "curvature", settings, values)
    drawn = draw_curvature({"LSQ": [only(folder)]}, "title")
    assert drawn.table == [("LSQ", "top_eigenvalue", 3.0, 0.1, converged), ("LSQ", "trace", 9.0, 1.0, True)]
    marks = [text.get_text() for legend in drawn.figure.legends for text in legend.get_texts()]
    assert marks == ([] if converged else ["not converged"])


def test_accuracies_around_the_re_estimation(tmp_path: Path) -> None:
    folder = write_run(tmp_path, 0.8)
    assert before_and_after(only(folder)) is None
    settings = {"deployment": "final", "part": "test", "batches": 20}
    keep_measurement(folder, "batchnorm", settings, {"before": 0.5, "after": 0.75})
    assert before_and_after(only(folder)) == (50, 75)
    sealed: dict[str, Any] = {**only(folder), "accuracy_before_batchnorm": 0.25, "accuracy": 0.5}
    assert before_and_after(sealed) == (25, 50)


def test_shares_by_number_of_oscillations() -> None:
    assert at_least({"a": [2, 1, 1], "b": [4]}) == [100, 25, 12.5]


def test_distances_to_the_nearest_level() -> None:
    levels = [-2.0, -1.0, 0.0, 1.0]
    at_a_level = distances({"levels": levels, "histogram": {"start": 1.0, "share": [1.0]}})
    assert at_a_level[0] == pytest.approx(1) and len(at_a_level) == FOLDS
    at_a_threshold = distances({"levels": levels, "histogram": {"start": -0.55, "share": [0.5, 0.5]}})
    assert at_a_threshold[-1] == pytest.approx(1)
    clipped = distances({"levels": levels, "histogram": {"start": 1.0, "share": [0.5] + [0.0] * 19 + [0.5]}})
    assert clipped[0] == pytest.approx(1)
