"""How long a training will take, from the records of like runs that finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.runs.folder import RunFolder
from research.runs.records import read_config, read_summary

SAME = ("model", "data")
"""Config groups that must agree, with the set of mechanics, for two runs to take like times."""

NOT_TIME = ("name", "seed", "paths", "logger", "init_from", "checkpoint", "finalise", "deploy")
"""Config groups that training time does not depend on."""


@dataclass(frozen=True)
class Finished:
    """A finished run: its config, and the seconds of an epoch and of a step of its training."""

    folder: RunFolder
    config: Mapping[str, Any]
    epoch_seconds: float
    step_seconds: float
    hardware: str

    @property
    def name(self) -> str:
        """``<experiment>/<hash>``."""
        return f"{self.folder.experiment}/{self.folder.hash}"


@dataclass(frozen=True)
class Estimate:
    """Seconds that remain of a training, and the run that says so."""

    seconds: float
    source: Finished


class Durations:
    """The finished runs below some folders, which are read once and only as far as they are needed.

    Args:
        roots: folders of run folders, such as ``runs``.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        paths = [path for root in roots for path in sorted(root.glob("*/*/summary.json"))]
        self._summaries = [(path.parent, read_summary(path)) for path in paths]
        self._read: dict[Path, Finished] = {}

    def estimate(self, config: Mapping[str, Any], done_steps: int = 0) -> Estimate | None:
        """How long the rest of a training takes: the nearest like run's seconds times its epochs or steps.

        A like run has the same network, data and mechanics; the nearest differs in the fewest other values, and is the
        latest of those. None where no like run has finished, or the training has no end of its own.

        Args:
            config: plain config of the training.
            done_steps: optimizer steps that it has behind it.
        """
        like = [run for run in self._candidates(config) if all(_same(run.config, config, key) for key in SAME)]
        if not like:
            return None
        nearest = min(like, key=lambda run: (_distance(run.config, config), -run.folder.summary_path.stat().st_mtime))
        epochs, steps = config["trainer"]["max_epochs"], config["trainer"]["max_steps"]
        bounds = [epochs * nearest.epoch_seconds] if epochs > 0 else []
        if steps > 0:
            bounds.append(steps * nearest.step_seconds)
        if not bounds:
            return None
        return Estimate(max(0.0, min(bounds) - done_steps * nearest.step_seconds), nearest)

    def _candidates(self, config: Mapping[str, Any]) -> list[Finished]:
        network = config["model"]["_target_"].rpartition(".")[2]
        wanted = (network, config["data"]["name"], sorted(config["callbacks"]))
        found = []
        for path, summary in self._summaries:
            told = (summary.get("model"), summary.get("data"), summary.get("mechanics"))
            if told == wanted and summary["epochs"] and summary["steps"]:
                if path not in self._read:
                    self._read[path] = _finished(path, summary)
                found.append(self._read[path])
        return found


def _finished(path: Path, summary: Mapping[str, Any]) -> Finished:
    folder = RunFolder(path.absolute(), path.parent.name, summary["hash"])
    seconds = float(summary["seconds"])
    return Finished(
        folder=folder,
        config=read_config(folder.config_path),
        epoch_seconds=seconds / summary["epochs"],
        step_seconds=seconds / summary["steps"],
        hardware=summary.get("hardware") or "unknown hardware",
    )


def _same(one: Mapping[str, Any], other: Mapping[str, Any], group: str) -> bool:
    """Whether two configs agree in a group, whatever its seed."""
    return _flat({**one[group], "seed": None}) == _flat({**other[group], "seed": None})


def _distance(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    """The number of values in which two configs differ, of those that may change the time."""
    left, right = (_flat({k: v for k, v in config.items() if k not in NOT_TIME}) for config in (one, other))
    return len({*left.items()} ^ {*right.items()})


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = repr(value)
    return flat
