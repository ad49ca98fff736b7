"""Factors, their effects and interactions on sweeps whose answers are known."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from analysis import ablation
from analysis.ablation import analyse, draw_effects, draw_interactions, pairs
from analysis.collect import collect
from analysis.factors import balanced, effect, factor, find_factors, interaction, settings
from tests.analysis.run_folders import keep_measurement, write_run

RATES = (0.02, 0.1, 0.1234567891)


@pytest.fixture
def runs(tmp_path: Path) -> str:
    """Three rates by with and without SAM by two seeds: the rate adds 0, 1 and 2 points, SAM adds 4, seeds 0 and 1."""
    for position, lr in enumerate(RATES):
        for seed in (0, 1):
            accuracy = 0.80 + 0.01 * (position + seed)
            write_run(tmp_path, accuracy, seed=seed, lr=lr, typed=[f"optimizer.lr={lr}"])
            write_run(tmp_path, accuracy + 0.04, seed=seed, lr=lr, callbacks={"sam": {"rho": 0.1, "eta": 0}})
    return f"{tmp_path}/*/*"


def test_factors_are_what_varies_and_what_varies_together_is_one(runs: str) -> None:
    found = {one.key: one for one in find_factors(collect(runs))}
    assert found.keys() == {"optimizer.lr", "mechanics"}
    assert found["optimizer.lr"].levels == tuple(map(str, RATES)) and found["optimizer.lr"].numeric
    assert found["mechanics"].levels == ("none", "sam") and not found["mechanics"].numeric
    assert found["mechanics"].same == ("callbacks.sam.eta", "callbacks.sam.rho")


def test_what_was_typed_names_a_factor_and_the_seed_never_does(tmp_path: Path) -> None:
    write_run(tmp_path, 0.8, seed=0, callbacks={"sam": {"rho": 0.1, "a": 1}}, typed=["callbacks.sam.rho=0.1"])
    write_run(tmp_path, 0.8, seed=1, callbacks={"sam": {"rho": 0.2, "a": 2}}, name="other")
    rows = collect(f"{tmp_path}/*/*")
    assert [(one.key, one.same) for one in find_factors(rows)] == [("callbacks.sam.rho", ("callbacks.sam.a",))]
    assert not {"seed", "data.seed", "trainer.enable_progress_bar"} & settings(rows[0]).keys()


def test_levels_are_ordered_by_number_with_absent_first() -> None:
    one = factor("key", ["10", "2", "absent", "word", "2"])
    assert one.levels == ("absent", "2", "10", "word") and one.of == (2, 1, 0, 3, 1) and not one.numeric


def test_effects_are_means_over_everything_else(runs: str) -> None:
    found = analyse(collect(runs))
    assert [one.key for one in found.factors] == ["mechanics", "optimizer.lr"]  # 4 points, then 2
    assert found.metric == "quantized %" and found.fair == [True, True] and found.left_out == []
    by_sam, by_rate = found.effects
    assert [level.mean for level in by_sam] == pytest.approx([81.5, 85.5])
    assert [level.mean for level in by_rate] == pytest.approx([82.5, 83.5, 84.5])
    assert by_rate[0].deviation == pytest.approx((2 * (2.5**2 + 1.5**2) / 3) ** 0.5)
    (pair,) = pairs(found)
    assert [one.key for one in pair] == ["optimizer.lr", "mechanics"]
    cells = interaction(*pair, found.values)
    assert [cell.levels for cell in cells] == [(str(lr), name) for name in ("none", "sam") for lr in RATES]
    assert [cell.mean for cell in cells] == pytest.approx([80.5, 81.5, 82.5, 84.5, 85.5, 86.5])


def test_unbalanced_levels_are_told(runs: str, tmp_path: Path) -> None:
    write_run(tmp_path, 0.9, seed=7, lr=0.02)
    rows = collect(runs)
    factors = find_factors(rows)
    assert [balanced(one, factors, rows) for one in factors] == [False, False]
    title = draw_effects(analyse(rows)).figure.axes[0].get_title()
    assert "unbalanced" in title


def test_the_command_writes_pictures_and_their_data(
    runs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ablation.main(runs, "optimizer.lr,callbacks.sam.rho", "val/loss", str(tmp_path / "figures"))
    for stem in ("ablation_effects", "ablation_interactions"):
        assert (tmp_path / f"figures/{stem}.pdf").read_bytes().startswith(b"%PDF")
        assert (tmp_path / f"figures/{stem}.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "figures/ablation_effects.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["factor"], line["level"], line["n"]) for line in lines[3:]] == [
        ("callbacks.sam.rho", "absent", "6"), ("callbacks.sam.rho", "0.1", "6")
    ]  # fmt: skip
    assert lines[0]["mean val/loss"] == "0" and lines[0]["balanced"] == "True"
    assert "wrote" in capsys.readouterr().out


def test_pictures_have_labels_and_lines_that_differ_without_colour(runs: str) -> None:
    found = analyse(collect(runs))
    effects = draw_effects(found).figure
    assert [axis.get_ylabel() for axis in effects.axes] == ["quantized %"] * 2
    assert [tick.get_text() for tick in effects.axes[1].get_xticklabels()] == ["0.02", "0.1", "0.123457"]
    assert [text.get_text() for text in effects.legends[0].texts] == [
        "one run", "mean ± standard deviation over all else"
    ]  # fmt: skip
    (axis,) = draw_interactions(found, pairs(found)).figure.axes
    looks = {(line.get_linestyle(), line.get_marker()) for line in axis.lines if line.get_marker() in "os"}
    assert len(looks) == 2 and axis.get_xlabel() == "optimizer.lr"
    assert axis.get_legend().get_title().get_text() == "mechanics"


def test_what_cannot_be_drawn_is_said(runs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = collect(runs)
    with pytest.raises(ValueError, match="^factors=optimizer.rl: is in no run; these vary: optimizer.lr"):
        analyse(rows, ["optimizer.rl"])
    with pytest.raises(ValueError, match="^factors=optimizer.momentum: is the same in all runs"):
        analyse(rows, ["optimizer.momentum"])
    with pytest.raises(ValueError, match="^factors=: nothing but the seed varies"):
        analyse([row for row in rows if row["config"]["optimizer"]["lr"] == 0.1 and not row["mechanics"]])
    with pytest.raises(ValueError, match="^metric=hardware: no run has this number"):
        analyse(rows, metric="hardware")
    folder = write_run(tmp_path, 0.8, lr=0.5)
    keep_measurement(folder, "curvature", {}, {"trace": 2.0})
    keep_measurement(write_run(tmp_path, 0.8, lr=0.6), "curvature", {}, {"trace": 3.0})
    ablation.main(runs, None, "measurement:curvature.trace", str(tmp_path / "figures"))
    assert "12 of 14 rows have no measurement:curvature.trace: left out" in capsys.readouterr().out


def test_effect_of_one_row_has_no_deviation() -> None:
    (low, high) = effect(factor("key", ["1", "2", "2"]), [0.5, 1.0, 2.0])
    assert low.mean == 0.5 and low.deviation is None and high.mean == 1.5
