"""The command: a run is trained, rebuilt and measured; the numbers are in its folder, in W&B and on the screen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from analysis.collect import collect
from analysis.curvature import DEFAULTS, Options, flat_values, main
from analysis.ste_pitfall import END, PAGE, START, experiment, filled, markdown
from research import results
from research.arguments import check_arguments
from research.learning.finalise import measure
from research.results import finished_network, recorded_data, starting_network
from research.runs.folder import RunFolder
from research.runs.measurements import read_measurements
from research.runs.records import read_config, read_summary
from research.targets import resolve_target
from research.train import main as train
from tests.learning.tiny import float_weights
from tests.test_bad_input import TINY, command, run_folder

SMALL = {
    "images": 12,
    "batch_size": 8,
    "k": 1,
    "tolerance": 0.5,
    "max_iterations": 4,
    "probes": 6,
    "block_probes": 6,
    "seeds": 0,
    "density_runs": 1,
    "density_steps": 3,
}
MODEL = {"_target_": "research.models.resnet8", "num_classes": 10, "width": 4}


def trained(folder: Path, *settings: str) -> Path:
    """The folder of a run of one epoch from float weights."""
    weights = float_weights(folder / "float.safetensors", MODEL)
    done = command(train, *TINY, "trainer.max_epochs=1", f"init_from={weights}", *settings, f"paths.runs={folder}")
    assert done.code == 0, done.err
    return run_folder(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose batch-norms were folded."""
    return trained(tmp_path_factory.mktemp("runs"), "quantizer.fold_bn=2")


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / run.parent.name / run.name))


def options(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**DEFAULTS, **SMALL, "wandb": "disabled", **changes}.items() if key != "runs"}


def accuracy_and_loss(folder: RunFolder, net: nn.Module) -> dict[str, float]:
    """What `measure` says of a network on the run's test images."""
    task = resolve_target(read_config(folder.config_path)["task"], key="task")
    return measure(net, task, results.test_batches(recorded_data(folder, {"data": "data"})))


def test_a_finished_network_is_the_one_of_the_summary(run: Path) -> None:
    folder = RunFolder.existing(run)
    state = torch.get_rng_state()
    net = finished_network(folder)
    assert torch.equal(torch.get_rng_state(), state) and not net.training
    found = accuracy_and_loss(folder, net)
    (row,) = read_summary(folder.summary_path)["deployments"]
    assert found == {key: row[key] for key in found}


def test_a_network_that_a_mechanic_changed_is_rebuilt(tmp_path: Path) -> None:
    folder = RunFolder.existing(trained(tmp_path, "callbacks=[oscillation_freezing]"))
    found = accuracy_and_loss(folder, finished_network(folder))
    (row,) = read_summary(folder.summary_path)["deployments"]
    assert found == {key: row[key] for key in found}


def test_the_starting_network_has_the_float_accuracy(run: Path) -> None:
    folder = RunFolder.existing(run)
    net, weights = starting_network(folder, {"checkpoints": "", "runs": ""})
    assert (
        accuracy_and_loss(folder, net)["accuracy"]
        == read_summary(folder.summary_path)["deployments"][0]["float_accuracy"]
    )
    assert weights.name == "float.safetensors"


def test_networks_that_cannot_be_rebuilt(copy: Path) -> None:
    folder = RunFolder.existing(copy)
    with pytest.raises(ValueError, match="deployment=other: the run has final"):
        finished_network(folder, "other")
    folder.final.write_bytes(b"torn")
    with pytest.raises(ValueError, match="final.safetensors is missing or damaged"):
        finished_network(folder)
    folder.summary_path.unlink()
    with pytest.raises(ValueError, match="not finished"):
        finished_network(folder)


def test_measured_once_kept_logged_and_printed(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demanded = {"density": True, "per_layer": True, "per_quantizer": True}
    chosen = options(wandb="offline", initial=True)
    main(str(copy), **chosen)
    folder = RunFolder.existing(copy)
    first = read_measurements(folder, "curvature")
    assert {record["settings"]["deployment"] for record in first} == {"initial", "final"}
    for record in first:
        values = record["values"]
        assert values["taken_on"]["surface"] == "quantized" and values["taken_on"]["data"]["samples"] == 12
        assert values["eigenvalues"][0].keys() == {"value", "residual", "converged"}
        assert values["trace"]["standard_error"] > 0 and values["taken_on"]["dtype"] == "float32"
    shown = capsys.readouterr().out
    assert shown.count("trace") == shown.count("±") == 2
    logs = list(copy.glob("wandb/offline-run-*/*.wandb"))
    assert logs and all(copy.name in log.name for log in logs)
    assert any(b"curvature/quantized/hessian/final/seed0/trace" in log.read_bytes() for log in logs)

    shutil.rmtree(copy / "wandb")
    main(str(copy), **chosen)
    assert read_measurements(folder, "curvature") == first and not (copy / "wandb").exists()
    assert capsys.readouterr().out == shown, "from the record, nothing is computed again"

    main(str(copy), **options(operator="ggn", surface="latent", **demanded))
    assert len(read_measurements(folder, "curvature")) == 3
    assert len(read_measurements(folder, "spectral_density")[0]["values"]["grid"]) == 1000
    assert "layer1.0.conv1" in read_measurements(folder, "layer_curvature")[0]["values"]["traces"]
    traces = read_measurements(folder, "quantizer_curvature")[0]["values"]["traces"]
    assert "layer1.0.conv1.input_quantizer" in traces


def test_values_that_have_not_converged_are_named_so() -> None:
    values = {
        "eigenvalues": [
            {"value": 2.0, "residual": 1e-4, "converged": True},
            {"value": 1.0, "residual": 0.5, "converged": False},
        ],
        "trace": {"value": 3.0, "standard_error": 0.1},
    }
    assert flat_values(values, "p") == {
        "p/top_eigenvalue": 2.0,
        "p/top_eigenvalue_residual": 1e-4,
        "p/eigenvalue_2_unconverged": 1.0,
        "p/eigenvalue_2_residual": 0.5,
        "p/trace": 3.0,
        "p/trace_standard_error": 0.1,
    }


def test_what_a_user_gets_wrong(copy: Path) -> None:
    for change, message in (
        ({"deployment": "best"}, "deployment=best: the runs have final"),
        ({"operator": "jacobian"}, "operator=jacobian"),
        ({"surface": "flat"}, "surface=flat"),
        ({"images": 10**6}, "images=1000000"),
        ({"wandb": "cloud"}, "mode=cloud"),
    ):
        with pytest.raises(ValueError, match=message):
            main(str(copy), **options(**change))
    assert collect(str(copy))[0]["name"] == "final"


def test_the_pitfall_is_one() -> None:
    found = experiment()
    (right, symmetric), (wrong, lopsided) = found.forms.values()
    assert found.gradient_difference < 1e-12, "nothing to be seen in the first derivatives"
    assert symmetric < 1e-10 and lopsided > 0.01 and abs(wrong / right - 1) > 0.1
    assert max(abs(value / found.eigenvalue - 1) for value in found.differences.values()) > 0.5
    page = Path(PAGE).read_text()
    assert filled(page, markdown(found)) == page, f"run python -m analysis.ste_pitfall page={PAGE}"
    with pytest.raises(ValueError, match="no lines"):
        filled(page.replace(START, "").replace(END, ""), "")


def test_the_record_of_a_measurement_is_json(copy: Path) -> None:
    main(str(copy), **options())
    (path,) = (copy / "measurements").glob("curvature-*.json")
    assert json.loads(path.read_text())["settings"]["images"] == 12


def test_every_option_has_a_type_and_a_default() -> None:
    assert set(Options.__annotations__) == set(DEFAULTS) - {"runs"}
    given = {**DEFAULTS, **dict.fromkeys({"runs"}, "x")}
    check_arguments(main, given, key="")
    with pytest.raises(ValueError, match="^images='abc': use an integer$"):
        check_arguments(main, {**given, "images": "abc"}, key="")
