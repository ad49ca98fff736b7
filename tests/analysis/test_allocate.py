"""The command: bits for the layers of a run, within a budget, kept, written, retrained, drawn."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from analysis.allocate import DEFAULTS, Options, main
from analysis.collect import collect
from analysis.figures import allocation_pareto
from analysis.figures.allocation_bits import draw, gathered
from analysis.figures.base import NoData, save
from research.arguments import check_arguments
from research.quant.allocation import Allocation
from research.runs.allocation import ALLOCATION, read_allocation, read_table, write_allocation
from research.runs.folder import RunFolder
from research.runs.measurements import read_measurements
from research.runs.records import MetricsRecord, read_summary
from research.train import main as train
from tests.learning.tiny import float_weights
from tests.test_bad_input import TINY, command, run_folder

MODEL = {"_target_": "research.models.resnet8", "num_classes": 10, "width": 4}
INNER = {"first_last": "excluded"}
SHORT = ("trainer.max_epochs=1", "data.options.train=90")


def trained(folder: Path, *settings: str) -> Path:
    """The folder of a run of one epoch."""
    done = command(train, *TINY, *SHORT, *settings, f"paths.runs={folder}")
    assert done.code == 0, done.err
    return run_folder(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A float run, and one at 4 bits that started from float weights."""
    root = tmp_path_factory.mktemp("runs")
    weights = float_weights(root / "float.safetensors", MODEL)
    return {
        "float": trained(root / "float", "quantizer=float"),
        "lsq": trained(root / "lsq", f"init_from={weights}"),
    }


@pytest.fixture
def copies(runs: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Both runs, to write into."""
    return {
        name: Path(shutil.copytree(path, tmp_path / name / path.parent.name / path.name)) for name, path in runs.items()
    }


def budget(value: float = 3, **convention: Any) -> dict[str, Any]:
    return {"kind": "average_bits", "value": value, "convention": convention or INNER}


def allocated(run: Path, output: Path, **changes: Any) -> Allocation:
    """What the command writes."""
    small = {"images": 12, "batch_size": 8, "probes": 2, "budget": budget(), "method": "greedy", "bits": [2, 4]}
    main(**{**DEFAULTS, **small, "run": str(run), "output": str(output), **changes})
    return read_allocation(output)


def inner_bits(allocation: Allocation) -> set[tuple[int, int]]:
    return set(list(allocation.values())[1:-1])


def test_uniform(copies: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = allocated(copies["lsq"], tmp_path / "a.yaml", method="uniform", bits=[2, 3, 4])
    assert inner_bits(found) == {(3, 3)} and found["conv1"] == found["fc"] == (8, 8)
    shown = capsys.readouterr().out
    assert "average_bits 3 of 3, feasible 2 to 4 bits per weight" in shown
    assert f"train with quantizer.table={tmp_path / 'a.yaml'}" in shown
    searched = allocated(
        copies["lsq"], tmp_path / "a.yaml", method="uniform", input_bits=8, first_last=None, budget=budget(2.5)
    )
    assert set(searched.values()) == {(2, 8)}
    assert not read_measurements(RunFolder.existing(copies["lsq"]), "sensitivity")
    for wrong, message in (
        ({"bits": [1, 2]}, "quantizer.weight.bits=1: lsq of a weight needs at least 2"),
        ({"bits": []}, r"^bits=\[\]: give one value or more"),
        ({"input_bits": 0}, "^input_bits=0: use same, or one width"),
        ({"first_last": 0}, "^first_last=0: use one width such as 8, or null"),
        ({"threads": 0}, "^threads=0: use 1 or more, or null"),
    ):
        with pytest.raises(ValueError, match=message):
            allocated(copies["lsq"], tmp_path / "a.yaml", method="uniform", **wrong)


def test_shuffled(copies: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, file = read_table(copies["lsq"] / "table.yaml"), tmp_path / "found.yaml"
    widths = iter(((4, 4), (3, 2), (2, 2), (2, 4), (3, 3), (2, 3)))
    found = Allocation({name: (8, 8) if name in ("conv1", "fc") else next(widths) for name in base})
    write_allocation(file, found, base)

    def shuffle(**changes: Any) -> Allocation:
        options = {"method": "shuffled", "table": str(file), "budget": budget(3.2), **changes}
        return allocated(copies["lsq"], tmp_path / "a.yaml", **options)

    first = shuffle()
    assert first != found and sorted(first.values()) == sorted(found.values())
    assert first["conv1"] == first["fc"] == (8, 8)
    assert "average_bits" in capsys.readouterr().out
    assert shuffle() == first and any(shuffle(seed=seed) != first for seed in (1, 2, 3))
    loose = {"budget": budget(8, first_last="all"), "first_last": None}
    assert any(shuffle(**loose, seed=seed)["fc"] != (8, 8) for seed in range(5)), "searched ends are exchanged too"
    for change, message in (
        ({"table": None}, "^table=None: method=shuffled needs the allocation.yaml to shuffle"),
        ({"method": "uniform"}, "^table=.*found.yaml: method=shuffled needs"),
        (
            {"budget": budget(2.01)},
            r"^none of 1000 shuffles of the widths is within budget\.value=2\.01 \(at least [23]\.\d+\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            shuffle(**change)
    write_allocation(file, Allocation({name: (8, 8) if name in ("conv1", "fc") else (2, 2) for name in base}), base)
    with pytest.raises(ValueError, match="^table=: all layers that could be exchanged have the same widths"):
        shuffle()


@pytest.mark.parametrize("method", ["hessian_trace", "greedy"])
def test_measured_once_and_within_the_budget(
    copies: dict[str, Path], tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = allocated(copies["lsq"], tmp_path / "a.yaml", method=method)
    shown = capsys.readouterr().out
    assert inner_bits(first) <= {(2, 2), (4, 4)}
    folder = RunFolder.existing(copies["lsq"])
    (record,) = read_measurements(folder, "sensitivity")
    kept = record["values"]["sensitivities"]
    assert kept["conv1"].keys() == kept["fc"].keys() == {"W8A8"}
    assert all(values.keys() == {"W2A2", "W4A4"} for name, values in kept.items() if name not in ("conv1", "fc"))
    assert ("traces" in record["values"]) == (method == "hessian_trace")

    assert allocated(copies["lsq"], tmp_path / "b.yaml", method=method) == first
    assert read_measurements(folder, "sensitivity") == [record], "from the record, nothing is computed again"
    assert capsys.readouterr().out == shown.replace("a.yaml", "b.yaml")
    widest = allocated(copies["lsq"], tmp_path / "b.yaml", method=method, budget=budget(4))
    assert inner_bits(widest) <= {(2, 2), (4, 4)} and len(read_measurements(folder, "sensitivity")) == 1


def test_float_networks_and_other_quantizers(copies: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^quantizer=null: the run is float, so say which.*quantizer=lsq$"):
        allocated(copies["float"], tmp_path / "a.yaml")
    found = allocated(copies["float"], tmp_path / "a.yaml", quantizer="minmax", elsewhere="widest")
    assert inner_bits(found) <= {(2, 2), (4, 4)}
    assert {slots["weight"].name for slots in read_table(tmp_path / "a.yaml").values() if slots["weight"]} == {"minmax"}
    start = allocated(copies["lsq"], tmp_path / "a.yaml", method="hessian_trace", initial=True)
    assert inner_bits(start) <= {(2, 2), (4, 4)}
    (record,) = read_measurements(RunFolder.existing(copies["lsq"]), "sensitivity")
    assert record["settings"]["deployment"] == "initial"


def test_a_training_takes_it_and_costs_what_was_said(
    copies: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = {"kind": "size", "value": 12000}
    found = allocated(copies["float"], tmp_path / "allocation.yaml", quantizer="lsq", budget=size)
    cost = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("size "))
    run = trained(tmp_path / "runs", f"quantizer.table={tmp_path / 'allocation.yaml'}")
    assert read_allocation(run / "table.yaml") == found
    (row,) = read_summary(run / "summary.json")["deployments"]
    assert row["size_bits"] <= 12000 and cost.startswith(f"size {row['size_bits']:.6g} of 12000")


def test_what_a_user_gets_wrong(copies: dict[str, Path], tmp_path: Path) -> None:
    for change, message in (
        ({"method": "magic"}, "^method=magic: use one of uniform, shuffled, hessian_trace, greedy"),
        ({"elsewhere": "best"}, "^elsewhere=best: use one of float, widest"),
        ({"quantizer": "magic"}, "^quantizer=magic is unknown; use one of .*lsq"),
        ({"bits": [2, 9]}, r"^allocation\.layer1\.0\.conv1\.weight=9: use 0 to 8"),
        ({"bits": [1, 2]}, r"^allocation\.layer1\.0\.conv1: .*lsq of a weight needs at least 2"),
        ({"input_bits": "half"}, "^input_bits=half: use same, or one width"),
        ({"budget": budget(1.5)}, r"^budget\.value=1\.5: feasible are 2 to 4 bits per weight$"),
        ({"budget": {"kind": "size"}}, "^budget="),
        ({"images": 10**6}, "images=1000000"),
        ({"operator": "jacobian", "method": "hessian_trace"}, "operator=jacobian"),
    ):
        with pytest.raises(ValueError, match=message):
            allocated(copies["lsq"], tmp_path / "a.yaml", **change)
    assert not (tmp_path / "a.yaml").exists()


def test_the_figure(copies: dict[str, Path], tmp_path: Path) -> None:
    base = read_table(copies["lsq"] / "table.yaml")
    widths = iter((4, 3, 2, 2, 4, 0))
    mixed = Allocation({name: (8, 8) if name in ("conv1", "fc") else (next(widths), 4) for name in base})
    for path in (tmp_path / "searched.yaml", copies["lsq"] / ALLOCATION):
        write_allocation(path, mixed, base)
    steps = {0: dict.fromkeys(mixed, (4, 4)), 1: mixed}
    record = MetricsRecord(copies["lsq"] / "metrics.csv")
    for step, layers in steps.items():
        record.append(step, 0, Allocation(layers).metrics())
    record.close()
    rows = collect(f"{copies['lsq']},{copies['float']}")
    assert gathered(rows, [])[0] == {"LSQ, W2.5A4 mixed": mixed}
    drawn = draw(rows)
    assert len(drawn.figure.axes) == 3 and drawn.header == ("allocation", "step", "layer", "slot", "bits")
    maps = [line for line in drawn.table if line[1] != ""]
    assert {line[1] for line in maps} == {1, 2}
    assert {line[2]: line[4] for line in maps if line[1] == 2} == {name: bits.weight for name, bits in mixed.items()}
    bars = {line[2]: line[4] for line in drawn.table if line[1] == "" and line[3] == "input"}
    assert bars == {name: bits.input for name, bits in mixed.items()}
    save(drawn, tmp_path, "allocation_bits")

    allocated(copies["lsq"], tmp_path / "uniform.yaml", method="uniform", bits=[2])
    both = draw(rows, f"{tmp_path / 'searched.yaml'},{tmp_path / 'uniform.yaml'}")
    assert {line[0] for line in both.table if line[1] == ""} == {"searched", "uniform"}
    with pytest.raises(NoData, match="no run with quantizers"):
        draw(collect(str(copies["float"])))


def test_accuracy_against_cost(copies: dict[str, Path], tmp_path: Path) -> None:
    (row,) = collect(str(copies["lsq"]))
    base = read_table(copies["lsq"] / "table.yaml")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    widths = iter((4, 3, 2, 2, 4, 0))
    found = Allocation({name: (8, 8) if name in ("conv1", "fc") else (next(widths), 4) for name in base})
    write_allocation(mixed / ALLOCATION, found, base)
    searched = {**row, "path": mixed, "mechanics": ["bmpq"], "bops": 0.5 * row["bops"]}
    seeds = [{**searched, "seed": seed, "accuracy": accuracy} for seed, accuracy in enumerate((0.5, 0.7))]
    uniform = {**row, "accuracy": 0.55}
    drawn = allocation_pareto.draw([uniform, *seeds], costs="bops")
    (plain, better) = drawn.table
    assert plain[0].startswith("LSQ, W") and plain[3] == pytest.approx(55) and plain[4:] == (1, False)
    assert better[0] == "LSQ + BMPQ, W2.5A4 mixed" and better[3] == pytest.approx(60) and better[4:] == (2, True)
    assert better[2] == pytest.approx(0.5 * plain[2])
    save(drawn, tmp_path, "allocation_pareto")
    even = allocation_pareto.draw([{**row, "accuracy": 0.6}, *seeds], costs="size_kib")
    assert [line[-1] for line in even.table] == [True, True], "equal in both: neither is beaten"
    config = {**row["config"], "quantizer": {**row["config"]["quantizer"], "table": {}}}
    tables = [{**seeds[0], "mechanics": [], "config": config | {"seed": seed}, "table_from": f"{name}.yaml"}
              for seed, name in enumerate(("ssps", "sdq"))]  # fmt: skip
    config["quantizer"]["table"] = {"conv1": {"weight": {"name": "lsq", "bits": 8}}}
    names = [line[0] for line in allocation_pareto.draw([uniform, *tables], costs="bops").table[1:]]
    assert names == [f"LSQ, widths from {name}, W2.5A4 mixed" for name in ("ssps", "sdq")]
    with pytest.raises(ValueError, match="^costs=money: use some of bops"):
        allocation_pareto.draw([uniform], costs="money")
    with pytest.raises(NoData, match="no run with quantizers"):
        allocation_pareto.draw(collect(str(copies["float"])))


def test_every_option_has_a_type_and_a_default() -> None:
    assert set(Options.__annotations__) == set(DEFAULTS) - {"run", "method", "budget", "output"}
    given = {**DEFAULTS, **dict.fromkeys({"run", "method", "budget", "output"}, "x")}
    check_arguments(main, given, key="")
    with pytest.raises(ValueError, match="^images='abc': use an integer$"):
        check_arguments(main, {**given, "images": "abc"}, key="")
