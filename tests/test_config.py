"""Every experiment, sweep, debug setting and choice of every group composes, and builds its module and its data."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from research.config import build_data, build_module, plain
from research.quant.recipe import table_to_plain
from research.runs.folder import RunFolder
from research.runs.records import write_config
from research.settings import check_training
from research.train import build as prepared
from research.train import build_trainer
from research.train import main as train
from tests.conformance.registry import FIRST
from tests.test_bad_input import TINY, command

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
GROUPS = ("data", "model", "quantizer", "task", "optimizer", "scheduler", "trainer", "logger", "callbacks")


def names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def composed(overrides: list[str], config_name: str = "train", folder: Path = CONF) -> dict[str, Any]:
    """The plain config of a command line, without float weights, whose files a test may not have."""
    search = [] if folder == CONF else [f"hydra.searchpath=[file://{CONF}]"]
    with initialize_config_dir(str(folder), version_base="1.3"):
        return plain(compose(config_name, overrides=[*search, *overrides, "init_from=null"]))


def build(config: dict[str, Any]) -> None:
    check_training(config)
    module = build_module(config)
    assert set(module.describe().splitlines()[0].split()) == {"layer", "weight", "input", "output"}
    assert [mechanic.slug for mechanic in module.active] == sorted(config["callbacks"])
    data = build_data(config)
    assert (data.num_classes, data.in_channels) == (config["data"]["num_classes"], config["data"]["in_channels"])


CHOICES = [(group, name) for group in GROUPS for name in names(CONF / group)]


@pytest.mark.parametrize(("group", "name"), CHOICES, ids=[f"{group}={name}" for group, name in CHOICES])
def test_every_choice_of_every_group_builds(group: str, name: str) -> None:
    if group == "callbacks":
        build(composed([f"callbacks=[{name}]", f"quantizer={FIRST[name].quantizer['weight']['name']}"]))
    else:
        build(composed([f"{group}={name}"]))


def test_no_group_of_the_command_line_is_left_out() -> None:
    found = {path.name for path in CONF.iterdir() if path.is_dir() and any(path.glob("*.yaml"))}
    assert found == {*GROUPS, "experiment", "debug", "paths"}


@pytest.mark.parametrize("name", names(CONF / "experiment"))
def test_every_experiment_builds(name: str) -> None:
    config = composed([f"experiment={name}"])
    assert config["name"] == name, "an experiment's runs lie in the folder of its name"
    build(config)


@pytest.mark.parametrize("name", names(CONF / "debug"))
def test_every_debug_setting_builds(name: str) -> None:
    config = composed([f"debug={name}"])
    build(config)
    prepared(config)  # its parts of the data are large enough


def sweep_jobs(path: Path) -> list[list[str]]:
    """For every swept key, its values one by one: the overrides of as many jobs as there are values."""
    params = yaml.safe_load(path.read_text())["hydra"]["sweeper"]["params"]
    parser = OverridesParser.create()
    jobs = []
    for key, value in params.items():
        override = parser.parse_override(f"{key}={value}")
        choices = override.sweep_string_iterator() if override.is_sweep_override() else [value]
        jobs += [[f"{key}={choice}"] for choice in choices]
    return jobs


SWEEPS = [(name, job) for name in names(ROOT / "sweeps") for job in sweep_jobs(ROOT / f"sweeps/{name}.yaml")]


@pytest.mark.parametrize(("name", "job"), SWEEPS, ids=[f"{name}:{job[0]}" for name, job in SWEEPS])
def test_every_value_of_every_sweep_builds(name: str, job: list[str]) -> None:
    build(composed(job, config_name=name, folder=ROOT / "sweeps"))


def test_every_sweep_is_covered() -> None:
    assert {name for name, _ in SWEEPS} == set(names(ROOT / "sweeps"))


def test_the_table_of_one_run_is_the_recipe_of_the_next(tmp_path: Path) -> None:
    rules = "quantizer.rules=[{match: '@last', weight: {bits: 8}}, {match: 'layer2.*', weight: {bits: 3}}]"
    first = build_module(composed([rules, "quantizer.bits=2"]))
    write_config(tmp_path / "table.yaml", table_to_plain(first.table))
    config = composed([f"quantizer.table={tmp_path}/table.yaml", "quantizer.bits=4"])
    check_training(config)
    second = build_module(config)
    assert second.table == first.table and second.describe() == first.describe()


def test_bits_typed_beside_a_table_are_warned_of(tmp_path: Path) -> None:
    write_config(tmp_path / "table.yaml", {})
    typed = ["model=resnet8", f"quantizer.table={tmp_path}/table.yaml", f"paths.runs={tmp_path}", "quantizer.bits=4"]
    done = command(train, *TINY, *typed)
    assert "quantizer.table stands in place of quantizer.bits=4, which changes nothing" in done.out + done.err
    assert "quantizer.table does not fit this model" in done.refusal()


@pytest.mark.parametrize(("precision", "instructions"), [("bf16", False), ("bf16", True), ("32", False)])
def test_bf16_without_instructions_for_it_is_warned_of(
    precision: str,
    instructions: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("research.train.cpu_convolves_bf16", lambda: instructions)
    config = composed([f"trainer.precision={precision}", "trainer.accelerator=cpu"])
    with caplog.at_level(logging.WARNING, logger="research.train"):
        build_trainer(config, RunFolder.of(tmp_path, "precision", config), [])
    assert ("trainer.precision=32" in caplog.text) == (precision == "bf16" and not instructions)


@pytest.mark.parametrize("config_name", ["evaluate", "export"])
def test_the_other_commands_compose(config_name: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert compose(config_name, overrides=["run=somewhere"]).run == "somewhere"
