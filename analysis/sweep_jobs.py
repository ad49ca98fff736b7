"""The jobs of a sweep, as Hydra's sweeper makes them: overrides, configuration and run folder of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from research.config import plain
from research.error_line import CONF, USER_ERRORS, error_line
from research.runs.folder import RunFolder
from research.settings import check_training

SWEEPS = CONF.parent / "sweeps"


@dataclass(frozen=True)
class Job:
    """One job: what is swept of it and, unless its configuration is refused (``error``), config and run folder."""

    overrides: tuple[str, ...]
    config: dict[str, Any] | None
    folder: RunFolder | None
    error: str | None


def sweep_jobs(sweep: str, overrides: Sequence[str] = (), runs: str | None = None) -> list[Job]:
    """The jobs of ``python -m research.train -cd sweeps -cn SWEEP -m OVERRIDES``, in the sweeper's order.

    Args:
        sweep: name of a file in ``sweeps/``, path of another one, or ``train`` for a grid of overrides alone.
        overrides: further overrides; comma lists are swept.
        runs: ``paths.runs``; None for what the configuration says.

    Raises:
        ValueError: there is no such sweep, or the overrides cannot be read.
    """
    path = _sweep_file(sweep)
    shared = [] if path.parent == CONF else [f"hydra.searchpath=[file://{CONF}]"]
    if runs is not None:
        shared.append(f"paths.runs={runs}")
    try:
        with initialize_config_dir(str(path.parent), version_base="1.3"):
            top = compose(path.stem, overrides=shared, return_hydra_config=True)
            params = OmegaConf.to_container(OmegaConf.select(top, "hydra.sweeper.params") or OmegaConf.create({}))
            assert isinstance(params, dict)
            lines = [*(f"{key!s}={value}" for key, value in params.items()), *overrides]
            parsed = OverridesParser.create().parse_overrides(lines)
            (products,) = BasicSweeper.split_arguments(parsed, None)
            swept = {override.get_key_element() for override in parsed if override.is_sweep_override()}
            return [_job(path.stem, shared, job, swept) for job in products]
    except USER_ERRORS as error:
        raise ValueError(f"sweep={sweep}: {error_line(error)}") from error


def _sweep_file(sweep: str) -> Path:
    if sweep == "train":
        return CONF / "train.yaml"
    path = SWEEPS / f"{sweep}.yaml" if not sweep.endswith(".yaml") else Path(sweep).absolute()
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in SWEEPS.glob("*.yaml")))
        raise ValueError(f"sweep={sweep}: no such file; use one of {known}, train, or the path of a .yaml file")
    return path


def _job(name: str, shared: Sequence[str], overrides: Sequence[str], swept: set[str]) -> Job:
    """One job composed and checked as its training will be, but for data, weights and network."""
    shown = tuple(override for override in overrides if override.partition("=")[0] in swept)
    try:
        config = plain(compose(name, overrides=[*shared, *overrides]))
        check_training(config)
        return Job(shown, config, RunFolder.of(config["paths"]["runs"], config["name"], config), None)
    except USER_ERRORS as error:
        return Job(shown, None, None, error_line(error))
