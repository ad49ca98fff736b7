"""What figures of searches take from runs: costs beside budgets, multipliers of the chosen layers, bit gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from analysis.collect import Row, collect
from analysis.figures import bmpq_gradients, constrained_duals, csq_planes, sdq_choice, search_cost, ssps_certainty
from analysis.figures.base import Draw, NoData
from research.runs.folder import RunFolder
from research.runs.records import MetricsRecord
from tests.analysis.run_folders import write_run

THREE = {"kind": "average_bits", "value": 3}


def search(root: Path, mechanic: Mapping[str, Any], logged: Sequence[Mapping[str, float]], seed: int = 0) -> RunFolder:
    """A finished run with one mechanic that logged these metrics, every 10 steps."""
    folder = write_run(root, 0.8, seed, callbacks=mechanic)
    record = MetricsRecord(folder.metrics_path)
    for epoch, values in enumerate(logged):
        record.append(10 * epoch + 9, epoch, dict(values))
    record.close()
    return folder


def rows_of(root: Path) -> list[Row]:
    return collect(str(root / "*/*"))


def test_costs_are_parts_of_the_least_budget_of_their_kind(tmp_path: Path) -> None:
    size = {"kind": "size", "value": 100}
    for seed, costs in enumerate(((6.0, 3.0), (4.5, 2.4))):
        logged = [{"cost/average_bits": cost, "cost/size": 50.0} for cost in costs]
        search(tmp_path, {"bmpq": {"budget": [size, THREE, {**THREE, "value": 4}]}}, logged, seed)
    search(tmp_path, {"sam": {"rho": 0.1}}, [])
    rows = rows_of(tmp_path)
    assert search_cost.draw(rows).table == [
        ("LSQ + BMPQ, 3", 10, 1.75, 1.5, 2.0),
        ("LSQ + BMPQ, 3", 20, pytest.approx(0.9), pytest.approx(0.8), 1.0),
    ]
    assert [line[2] for line in search_cost.draw(rows, kind="size").table] == [0.5, 0.5]
    with pytest.raises(NoData, match="no run of a search with a budget of bops"):
        search_cost.draw(rows, kind="bops")


def test_an_input_budget_is_one_too() -> None:
    row = {"config": {"callbacks": {"edge_mpq": {"budget": THREE, "input_budget": {"kind": "size", "value": 7}}}}}
    assert search_cost.budget_of(row, "size") == 7 and search_cost.budget_of(row, "bops") is None


def test_layers_that_the_multipliers_chose_are_dark(tmp_path: Path) -> None:
    for seed, last in enumerate((0.5, 0.7)):
        logged = [
            {"constrained/dual/a": 0.1, "constrained/dual/b": 0.2, "constrained/dual/output": 9.0,
             "bits/a.weight": 2, "bits/b.weight": 2},
            {"constrained/dual/a": 0.1, "constrained/dual/b": last, "constrained/dual/output": 9.0,
             "bits/a.weight": 2, "bits/b.weight": 4},
        ]  # fmt: skip
        search(tmp_path, {"constrained": {"budget": THREE}}, logged, seed)
    drawn = constrained_duals.draw(rows_of(tmp_path))
    assert {line[:2] for line in drawn.table} == {(seed, layer) for seed in (0, 1) for layer in "ab"}
    first, second = drawn.figure.axes[1].patches
    assert (first.get_height(), second.get_height()) == (0.1, pytest.approx(0.6))
    assert sum(first.get_facecolor()[:3]) > sum(second.get_facecolor()[:3])


def test_the_norm_of_bit_gradients_is_the_runs_own_unless_given(tmp_path: Path) -> None:
    logged = [{"bmpq/enbg_raw/a": 1.0, "bmpq/enbg_per_bit/a": 0.25, "bits/a.weight": 4, "bits/fc.weight": 8}]
    search(tmp_path, {"bmpq": {"norm": "per_bit"}}, logged)
    rows = rows_of(tmp_path)
    assert bmpq_gradients.draw(rows).table == [("enbg_per_bit", "a", 10, 0.25), ("bits", "a", 10, 4.0)]
    assert bmpq_gradients.draw(rows, norm="raw").table[0] == ("enbg_raw", "a", 10, 1.0)
    with pytest.raises(ValueError, match="norm=sum: use raw or per_bit"):
        bmpq_gradients.draw(rows, norm="sum")


@pytest.mark.parametrize(
    ("draw", "slug"),
    [(bmpq_gradients.draw, "bmpq"), (constrained_duals.draw, "constrained"), (csq_planes.draw, "csq"),
     (sdq_choice.draw, "sdq"), (ssps_certainty.draw, "ssps")],
    ids=["bmpq", "constrained", "csq", "sdq", "ssps"],
)  # fmt: skip
def test_runs_without_the_search_are_no_data(draw: Draw, slug: str, tmp_path: Path) -> None:
    write_run(tmp_path, 0.8)
    with pytest.raises(NoData, match=rf"no run of callbacks=\[{slug}\] that logged {slug}/"):
        draw(rows_of(tmp_path))
