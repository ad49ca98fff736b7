"""What a search is: `sweeps/search/<name>.yaml`, checked, and what it means to Optuna."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, MedianPruner, NopPruner, PercentilePruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from yaml import YAMLError

FOLDER = Path(__file__).resolve().parent / "search"
Direction = Literal["maximize", "minimize"]
KINDS = {"float": FloatDistribution, "int": IntDistribution, "categorical": CategoricalDistribution}
SAMPLERS = {"random": RandomSampler, "tpe": TPESampler, "nsga2": NSGAIISampler}
PRUNERS = {"median": MedianPruner, "percentile": PercentilePruner, "successive_halving": SuccessiveHalvingPruner}
NOT_IDENTITY = ("paths.", "logger.")
"""Overrides that say where and how a run is shown; they may change while a study goes on."""


@dataclass(frozen=True)
class Search:
    """A search over training configurations.

    Args:
        name: experiment folder of its runs.
        objectives: direction, maximize or minimize, by what is optimized: a field of the first deployment in
            `summary.json`, or the last value of a metric in `metrics.csv` (a name with a slash).
        space: by config key, the `type` (float, int, categorical) and its options: `low`, `high`, `log`, `step`, or
            `choices`.
        trials: how many trials the study ends with, over all workers.
        sampler: its `name`, `seed` and further options.
        pruner: its `name`, the metric that it `monitor`s each epoch, and further options; None for no pruning.
        overrides: of every training, as on its command line.
    """

    name: str
    objectives: Mapping[str, Direction]
    space: Mapping[str, Mapping[str, Any]]
    trials: int
    sampler: Mapping[str, Any] = field(default_factory=lambda: {"name": "tpe", "seed": 0})
    pruner: Mapping[str, Any] | None = None
    overrides: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Raise ValueError, naming the key, for what no search can hold."""
        if not isinstance(self.name, str) or not re.fullmatch(r"\w[\w.+=-]*", self.name):
            raise ValueError(f"search.name={self.name!r}: use letters, digits, _ - . + = only")
        if not isinstance(self.trials, int) or self.trials < 1:
            raise ValueError(f"search.trials={self.trials!r}: use a positive number")
        for key in ("objectives", "space", "sampler"):
            if not isinstance(getattr(self, key), Mapping) or not getattr(self, key):
                raise ValueError(f"search.{key}={getattr(self, key)!r}: use `key: value` lines")
        for name, direction in self.objectives.items():
            if direction not in ("maximize", "minimize"):
                raise ValueError(f"search.objectives.{name}={direction}: use maximize or minimize")
        for override in self.overrides:
            if (key := override_key(override)) == "name":
                raise ValueError(f"{override}: runs lie in the folder of the search; use search.name")
            if key in self.space:
                raise ValueError(f"{override}: the search draws {key}; take it out of search.space or leave it out")
        self.distributions()
        self.sampler_of(0)
        self.make_pruner()

    @property
    def directions(self) -> list[Direction]:
        """Directions of the objectives, in their order."""
        return list(self.objectives.values())

    @property
    def monitor(self) -> str | None:
        """The metric that is reported each epoch, None without a pruner."""
        return None if self.pruner is None else self.pruner["monitor"]

    def identity(self) -> dict[str, Any]:
        """What all workers of a study must agree on: everything but the number of trials."""
        return {
            "objectives": [list(pair) for pair in self.objectives.items()],  # their order counts
            "space": self.space,
            "sampler": self.sampler,
            "pruner": self.pruner,
            "overrides": [text for text in self.overrides if not override_key(text).startswith(NOT_IDENTITY)],
        }

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distribution by config key."""
        made = {}
        for key, entry in self.space.items():
            where = f"search.space.{key}"
            if not isinstance(entry, Mapping):
                raise ValueError(f"{where}={entry!r}: use {{type: float, low: ..., high: ...}}")
            options = {name: value for name, value in entry.items() if name != "type"}
            made[key] = _make(KINDS, entry.get("type"), options, where, "type")
        return made

    def sampler_of(self, trial: int) -> BaseSampler:
        """The sampler of trial number `trial`, with a seed of its own.

        What it draws depends on the study so far and on this number, not on which worker asks or how often it started.
        """
        options = {"seed": 0, **self.sampler}
        seed = zlib.crc32(f"{options.pop('seed')}/{trial}".encode())
        sampler: BaseSampler = _make(SAMPLERS, options.pop("name", None), {**options, "seed": seed}, "search.sampler")
        return sampler

    def make_pruner(self) -> BasePruner:
        """The pruner, one that never prunes where there is none."""
        if self.pruner is None:
            return NopPruner()
        options = dict(self.pruner)
        if len(self.objectives) > 1:
            raise ValueError("search.pruner: several objectives cannot prune; use search.pruner=null")
        if not isinstance(options.pop("monitor", None), str):
            raise ValueError("search.pruner.monitor is missing: name a metric of each epoch, such as val/accuracy")
        pruner: BasePruner = _make(PRUNERS, options.pop("name", None), options, "search.pruner")
        return pruner


def read_search(name: str, changes: Sequence[str] = (), overrides: Sequence[str] = ()) -> Search:
    """The search of a file, or of a name in `sweeps/search`.

    Args:
        name: file, or its name without folder and suffix.
        changes: `key=value` for keys of the file, such as `trials=40`.
        overrides: further ones of every training.

    Raises:
        ValueError: no such file, or something in it that no search can hold, naming the key.
    """
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise ValueError(f"search={name}: no such file; use a .yaml file or one of {known}")
    try:
        content = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(changes))))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"search={name}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"search={name}: expected `key: value` lines")
    known_keys = [f.name for f in fields(Search)]
    for key in content:
        if key not in known_keys:
            raise ValueError(f"search.{key!s} is unknown: use {', '.join(known_keys)}")
    for key in ("name", "objectives", "space", "trials"):
        if key not in content:
            raise ValueError(f"search.{key} is missing in {path}")
    given = [*(content.pop("overrides", None) or ()), *overrides]
    return Search(**{str(key): value for key, value in content.items()}, overrides=given)


def override_key(override: str) -> str:
    """The config key of an override such as `+optimizer.lr=0.1`."""
    return override.partition("=")[0].lstrip("+~")


def _make(
    classes: Mapping[str, Callable[..., Any]], name: Any, options: Mapping[str, Any], where: str, key: str = "name"
) -> Any:
    """An object of Optuna's by its short name; what Optuna refuses becomes an error that names the key."""
    if name not in classes:
        raise ValueError(f"{where}.{key}={name}: use {', '.join(classes)}")
    try:
        return classes[name](**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
