"""Comparisons in tables: the best of a block, Welch's test, differences from a baseline and from a line of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from analysis import tables
from analysis.collect import collect
from analysis.formats import markdown
from tests.analysis.run_folders import sweep_of_two, write_run
from tests.analysis.test_tables import shown


def test_best_means_are_bold_and_tested_against_the_baseline_of_their_block(tmp_path: Path) -> None:
    sweep_of_two(tmp_path)
    options: dict[str, Any] = {"standard": ["method", "optimizer.lr", "accuracy", "val/loss"], "best": ["accuracy"]}
    found = shown(tmp_path, **options, baseline="lsq", within="optimizer.lr")
    assert sorted(found) == [
        ["lsq", "0.1", "81.00 ± 1.00", "0 ± 0"],
        ["lsq", "0.2", "**81.00 ± 1.00**", "0 ± 0"],
        ["lsq+sam", "0.1", "**86.00 ± 1.00** ↑", "0 ± 0"],
        ["lsq+sam", "0.2", "**81.00 ± 1.00**", "0 ± 0"],
    ]
    by_setting = shown(tmp_path, **options, baseline="method=lsq+sam,optimizer.lr=0.1")
    assert [line[2] for line in sorted(by_setting)] == [
        "81.00 ± 1.00 ↓", "81.00 ± 1.00 ↓", "**86.00 ± 1.00**", "81.00 ± 1.00 ↓"
    ]  # fmt: skip
    assert not [
        line
        for line in shown(tmp_path, **options, baseline="lsq", within="optimizer.lr", level=1e-6)
        if "↑" in str(line)
    ]
    with pytest.raises(ValueError, match=r"^baseline=lsq: 2 rows fit among resnet8, embedded, 4/4, 3; say more"):
        shown(tmp_path, **options, baseline="lsq")
    with pytest.raises(ValueError, match="^baseline=hero: no row"):
        shown(tmp_path, **options, baseline="hero")
    smallest = shown(tmp_path, standard=["accuracy"], best=["-accuracy"])
    assert sorted(line[0] for line in smallest) == ["**81.00 ± 1.00**"] * 3 + ["86.00 ± 1.00"]


def test_differences_from_the_baseline_seed_by_seed(tmp_path: Path) -> None:
    for seed, (plain, sam) in enumerate(((0.80, 0.83), (0.82, 0.84), (None, 0.90))):
        if plain:
            write_run(tmp_path, plain, seed=seed)
        write_run(tmp_path, sam, seed=seed, callbacks={"sam": {"rho": 0.1}})
    options: dict[str, Any] = {"standard": ["method", "accuracy"], "baseline": "lsq", "compared": ["accuracy"]}
    lines = sorted(shown(tmp_path, **options))
    assert lines == [["lsq", "81.00 ± 1.41", "–"], ["lsq+sam", "85.67 ± 3.79", "+2.50 ± 0.71 (n=2)"]]
    other = tmp_path / "another block"
    write_run(other, 0.5, lr=0.7)
    write_run(other, 0.4, callbacks={"hero": {"gamma": 1}})
    apart = shown(other, **options, within="optimizer.lr")
    assert sorted(apart) == [["lsq", "50.00", "–"], ["lsq+hero", "40.00", "–"]], "no baseline in the block, none told"
    with pytest.raises(ValueError, match=r"^difference=accuracy: from what\? Give baseline= as well"):
        shown(tmp_path, standard=["accuracy"], compared=["accuracy"])
    with pytest.raises(ValueError, match="^best=method: a column of text; use one of numbers"):
        shown(tmp_path, standard=["method"], best=["method"])
    with pytest.raises(ValueError, match="^difference=val/loss: no column of this table; use one of method, accuracy,"):
        shown(tmp_path, **options | {"compared": ["val/loss"]})


def test_one_seed_is_never_tested_and_the_notes_say_what_marks_mean(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path, 0.5 + 0.01 * seed, seed=seed)
    write_run(tmp_path, 0.9, callbacks={"sam": {"rho": 0.1}})
    table = tables.result_table(collect(f"{tmp_path}/*/*"), best=["accuracy"], baseline="lsq")
    text = markdown(table)
    assert "| **90.00** |" in text and "**Bold**: the best mean among rows of equal model, data, bits, epochs." in text
    assert "below the baseline `lsq` of equal model, data, bits, epochs: Welch's two-sided t-test" in text
    assert "p < 0.05" in text and not [line for line in text.splitlines() if line.startswith("|") and "↑" in line]


def test_differences_at_equal_cost_are_from_the_line_through_all_baselines() -> None:
    """Baselines of 80 and 84 % at 1 and 3 Gbit-operations with seed 0, of 81 and 83 with seed 1."""

    def row(method: str, seed: int, accuracy: float, gbops: float) -> dict[str, Any]:
        return {
            "run": None, "path": None, "name": "final", "experiment": method, "hash": f"{method}{seed}{gbops}",
            "seed": seed, "config": {"name": method, "gbops": gbops}, "model": "m", "data": "d", "epochs": 1,
            "mechanics": [], "metrics": {}, "accuracy": accuracy, "bops": gbops * 1e9,
        }  # fmt: skip

    rows = [row("even", 0, 0.80, 1), row("even", 0, 0.84, 3), row("even", 1, 0.81, 1), row("even", 1, 0.83, 3)]
    rows += [row("mixed", 0, 0.835, 2), row("mixed", 1, 0.845, 2), row("mixed", 2, 0.9, 2), row("wide", 0, 0.9, 4)]
    options: dict[str, Any] = {"standard": ["experiment", "gbops", "accuracy"], "within": "model,data,epochs"}
    options |= {"baseline": "even", "compared": ["accuracy"], "at_equal": ["gbops"]}
    table = tables.result_table(rows, **options)
    assert table.titles == ["experiment", "GBOPs", "accuracy %", "Δ accuracy % at equal GBOPs"]
    assert {tuple(c.written()[0] for c in line[:2]): line[3].values for line in table.lines} == {
        ("even", "1.000"): (),
        ("even", "3.000"): (),
        ("mixed", "2.000"): pytest.approx((1.5, 2.5)),
        ("wide", "4.000"): (),
    }
    assert "equal GBOPs: the number less that of the rows with `even` of equal model, data, epochs" in markdown(table)
    assert "↑" not in markdown(table)
    with pytest.raises(ValueError, match=r"^at_equal=gbops: which difference\? Give difference= as well"):
        tables.result_table(rows, **options | {"compared": []})
    with pytest.raises(ValueError, match="^at_equal=size: no column of this table; use one of experiment, gbops,"):
        tables.result_table(rows, **options | {"at_equal": ["size"]})
    with pytest.raises(ValueError, match=r"^at_equal=gbops: two baselines of seed 1 cost 2 GBOPs; say more"):
        tables.result_table([*rows, row("even", 1, 0.8, 2), row("even", 1, 0.9, 2) | {"config": {}}], **options)


def test_rows_are_chosen_by_their_columns(tmp_path: Path) -> None:
    sweep_of_two(tmp_path)
    assert shown(tmp_path, standard=["method", "optimizer.lr"], where="method=lsq,optimizer.lr=0.2") == [["lsq", "0.2"]]
    assert {line[0] for line in shown(tmp_path, standard=["method"], where="lsq+sam")} == {"lsq+sam"}
    for same in ("optimizer.lr=2e-1", "optimizer.lr=0.20", "optimizer.lr=0.2,trainer.max_epochs=3.0"):
        assert shown(tmp_path, standard=["optimizer.lr"], where=f"method=lsq,{same}") == [["0.2"]]
    for other in ("optimizer.lr=true", "optimizer.lr=null", "optimizer.lr=[0.2]", "optimizer.lr=0.2: 3"):
        with pytest.raises(ValueError, match="no row"):
            shown(tmp_path, where=other)
    with pytest.raises(ValueError, match="^where=hero: no row; give a method or experiment of the table, or COLUMN="):
        shown(tmp_path, where="hero")
