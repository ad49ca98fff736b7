"""Landscape, sharpness and interpolation of real (tiny) runs, as commands: measured once, kept, drawn."""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from analysis import interpolation, landscape, sharpness
from analysis.cli import script
from analysis.collect import collect
from analysis.subject import names, run_folder, subject
from research.curvature.interpolation import LEVELS
from research.learning.finalise import measure
from research.runs.measurements import read_measurements
from research.train import main as train
from tests.test_bad_input import TINY, command

OPTIONS: dict[str, Any] = {"images": 40, "batch_size": 25}
SLICE: dict[str, Any] = {"span": 0.5, "points": 3, "kinds": ["weight"], "seed": 0, **OPTIONS}
BALL: dict[str, Any] = {"norm": "relative", "site": "quantized", "kinds": ["weight"], "seed": 0, **OPTIONS}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs that differ in their seed."""
    runs = tmp_path_factory.mktemp("trained")
    for seed in (1, 2):
        done = command(
            train, *TINY, "model=resnet8", "trainer.max_epochs=1", "name=lsq", f"seed={seed}", f"paths.runs={runs}"
        )
        assert done.code == 0, done.err
    return runs


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy of them to write into."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def nothing(*arguments: Any) -> Any:
    raise AssertionError("nothing is left to measure")


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def pictures(path: Path) -> bool:
    return all(path.with_suffix(suffix).stat().st_size > 5000 for suffix in (".pdf", ".png"))


@pytest.mark.parametrize(("dimensions", "site"), [(1, "latent"), (2, "quantized")])
def test_a_landscape(
    runs: Path, tmp_path: Path, dimensions: int, site: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    landscape.main(f"{runs}/*/*", site, dimensions, output=str(tmp_path), data="none", **SLICE)
    assert "seed 1: loss" in capsys.readouterr().out
    path = tmp_path / f"landscape_{dimensions}d_{site}.csv"
    lines = table(path)
    assert pictures(path) and len(lines) == 2 * 3**dimensions
    monkeypatch.setattr(landscape, "subject", nothing)
    for row in collect(f"{runs}/*/*"):
        record = landscape.measure_landscape(row, {"site": site, "dimensions": dimensions, **SLICE}, "none")
        assert [record] == read_measurements(run_folder(row), "landscape"), "measured once"
        assert record["settings"]["surface"] == "perturbation"
        values = record["values"]
        assert values["positions"] == [-0.5, 0.0, 0.5]
        middle = values["losses"][1]
        assert values["clean"] == (middle if dimensions == 1 else middle[1])
        assert values["minimum"] <= values["clean"] and len(values["minimum_at"]) == dimensions
        mine = [float(line["loss"]) for line in lines if line["hash"] == row["hash"]]
        assert min(mine) == pytest.approx(values["minimum"], rel=1e-5)


def test_a_map_without_heights_is_refused(runs: Path) -> None:
    row = collect(f"{runs}/*/*")[0]
    settings = {"site": "latent", "dimensions": 2, **SLICE, "span": 1e-9}
    record = landscape.measure_landscape(row, settings, "none")
    assert record["values"]["minimum_at"] == [0, 0], "where nothing is lower, the network itself"
    with pytest.raises(ValueError, match="span=1e-09: the loss is .* everywhere; use a larger one"):
        landscape.draw([row], [record])


def test_sharpness(runs: Path, tmp_path: Path, capsys: Any) -> None:
    sharpness.main(
        f"{runs}/*/*", [0.2, 0.1], "average", directions=2, steps=9, output=str(tmp_path), data="none", **BALL
    )
    assert " ± " in capsys.readouterr().out
    path = tmp_path / "sharpness_average_relative_quantized.csv"
    assert pictures(path) and [line["rho"] for line in table(path)] == ["0.1", "0.2"] * 2
    for row in collect(f"{runs}/*/*")[:1]:
        worst = sharpness.measure_sharpness(row, {"form": "worst", "steps": 3, **BALL}, [0.1, 0.2], "none")
        once = sharpness.measure_sharpness(row, {"form": "one_step", "steps": 1, **BALL}, [0.2], "none")
        rises = [record["values"]["rise"] for record in (*worst, *once)]
        assert 0 < rises[0] < rises[1] and rises[2] < rises[1]
        records = read_measurements(run_folder(row), "sharpness")
        forms = [(record["settings"]["form"], record["settings"]["rho"]) for record in records]
        assert sorted(forms) == [("average", 0.1), ("average", 0.2), ("one_step", 0.2), ("worst", 0.1), ("worst", 0.2)]
        assert len({record["values"]["clean"] for record in records}) == 1
        for record in records:
            average = record["settings"]["form"] == "average"
            assert ("standard_error" in record["values"]) == average
            assert ("steps" in record["settings"]) == (not average)


def test_an_interpolation(runs: Path, tmp_path: Path) -> None:
    one, other = collect(f"{runs}/*/*")
    ends = [str(row["path"]) for row in (one, other)]
    interpolation.main(*ends, "latent", -0.5, 1.5, 3, output=str(tmp_path), data="none", **OPTIONS)
    path = tmp_path / "interpolation_latent.csv"
    assert pictures(path) and [line["t"] for line in table(path)] == ["-0.5", "0", "0.5", "1", "1.5"]
    settings = {"start": -0.5, "end": 1.5, "points": 3, **OPTIONS}
    found = [interpolation.measure_interpolation(one, other, {"level": x, **settings}, "none") for x in LEVELS]
    assert len(read_measurements(run_folder(one), "interpolation")) == 2
    for record in found:
        assert record["settings"]["other"] == f"lsq/{other['hash']}/final"
        losses = [row["loss"] for row in record["values"]["rows"]]
        assert record["values"]["barrier"] == max(losses[1:4]) - max(losses[1], losses[3])
        for row, loss in ((one, losses[1]), (other, losses[3])):
            of = subject(run_folder(row), "final", 40, 25, "none")
            assert loss == measure(of.net, of.task, of.batches)["loss"]


def test_names_tell_runs_apart(runs: Path) -> None:
    one, other = collect(f"{runs}/*/*")
    assert names([one]) == ["LSQ, W4A4"]
    assert sorted(names([one, other])) == ["LSQ, W4A4, seed 1", "LSQ, W4A4, seed 2"]
    again = {**one, "hash": "another"}
    assert names([one, again]) == [f"LSQ, W4A4, {one['hash']}", "LSQ, W4A4, another"]


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (landscape, ["dimensions=3"], "dimensions=3: use 1 or 2"),
        (landscape, ["points=4"], "points=4: use an odd number"),
        (landscape, ["site=codes"], "site=codes: use one of quantized, latent"),
        (landscape, ["images=1000"], "images=1000"),
        (landscape, ["kinds=[weight,wheel]"], "kinds=wheel: use some of weight, bias,"),
        (landscape, ["span=1e39"], "span=1e+39: the loss is not finite everywhere; use a smaller one"),
        (sharpness, ["form=best"], "form=best: use one of worst, one_step, average"),
        (sharpness, ["norm=box"], "norm=box: use one of plain"),
        (sharpness, ["rho=-1"], "rho=-1: use 0 or more"),
        (interpolation, ["level=codes"], "level=codes: use one of latent, quantized"),
        (interpolation, ["start=0.5"], "start=0.5 end=1.5: the runs lie at 0 and 1"),
    ],
)
def test_what_the_user_gets_wrong(
    runs: Path, module: Any, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    one, other = (row["path"] for row in collect(f"{runs}/*/*"))
    where = [f"one={one}", f"other={other}"] if module is interpolation else [f"runs={runs}/*/*"]
    monkeypatch.setattr(sys, "argv", [module.__name__, *where, "images=40", "points=3", *arguments])
    if module is sharpness:
        sys.argv.remove("points=3")
    with pytest.raises(SystemExit):
        script(module.main, module.DEFAULTS)
    assert message in capsys.readouterr().err
