"""The sweep files as a set, and the W&B sweep definitions, which start the same command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from research.settings import check_training
from tests.test_config import composed, names

ROOT = Path(__file__).resolve().parent.parent
WANDB = sorted((ROOT / "sweeps/wandb").glob("*.yaml"))
START = ["${env}", "python", "-m", "research.train"]


def definition(path: Path) -> dict[str, Any]:
    loaded = yaml.safe_load(path.read_text())
    assert isinstance(loaded, dict)
    return loaded


def test_every_experiment_of_a_quantized_network_on_cifar_is_part_of_a_sweep() -> None:
    swept = "\n".join(path.read_text() for path in (ROOT / "sweeps").glob("*.yaml"))
    experiments = [name for name in names(ROOT / "conf/experiment") if not name.startswith("float_")]
    alone = [name for name in experiments if "_cifar10_" in name and name not in swept]
    assert alone == []


def test_every_sweep_names_its_command() -> None:
    for path in (ROOT / "sweeps").glob("*.yaml"):
        assert f"# python -m research.train -cd sweeps -cn {path.stem} -m" in path.read_text(), path.name


@pytest.mark.parametrize("path", WANDB, ids=lambda path: path.stem)
def test_wandb_definitions_keep_to_its_schema(path: Path) -> None:
    schema = Path(sys.prefix) / "wandb_schema/sweeps/config/schema.json"
    if not schema.is_file():
        pytest.skip(f"no W&B schema: pip install --no-deps --target {sys.prefix}/wandb_schema sweeps==0.3.0")
    jsonschema = pytest.importorskip("jsonschema")
    rules = json.loads(schema.read_text())
    jsonschema.validate(definition(path), rules)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**definition(path), "method": "guess"}, rules)


@pytest.mark.parametrize("path", WANDB, ids=lambda path: path.stem)
def test_wandb_definitions_start_trainings_that_compose(path: Path) -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    sweep = definition(path)
    assert sweep["name"] == path.stem
    assert sweep["command"][:4] == START and sweep["command"][-1] == "${args_no_hyphens}"
    fixed = sweep["command"][4:-1]
    assert "logger.wandb.mode=online" in fixed, "W&B has to see the metric"
    choices = {key: rule.get("values") or [rule["min"], rule["max"]] for key, rule in sweep["parameters"].items()}
    for place in range(max(map(len, choices.values()))):
        values = {key: {"value": options[place % len(options)]} for key, options in choices.items()}
        arguments = create_sweep_command_args({"args": values})["args_no_hyphens"]
        assert set(arguments) == {f"{key}={value['value']}" for key, value in values.items()}
        check_training(composed([*fixed, *arguments]))
    name = sweep["metric"]["name"]
    assert name in ("val/accuracy", "final/accuracy"), "logged in training, or of the only deployment's summary"
