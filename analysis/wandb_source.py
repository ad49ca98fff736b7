"""W&B as a source of analysis: offline files, and projects through the online API.

A W&B run mirrors a run folder, so its rows are those of the folder as far as W&B knows: configuration, metrics and the
numbers of each deployment, which training writes into the W&B summary as ``<deployment>/<number>``. Overrides,
hardware, post-training accuracies and measurements stay in the run folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from analysis.rows import Run
from analysis.wandb_file import OfflineRun, history_rows, read_offline
from research.runs.records import Metric

SIGNATURE = {"accuracy", "bops"}
"""The numbers by which a group ``<name>/...`` of a W&B summary is recognised as a deployment."""


class WandbRun(Run):
    """A finished run as W&B recorded it."""

    def __init__(
        self,
        run: str,
        path: Path | None,
        config: Mapping[str, Any],
        summary: Mapping[str, Any],
        metrics: Mapping[str, float],
        history: Callable[[], list[Metric]],
        environment: Mapping[str, Any],
    ) -> None:
        """Make the rows; none where the summary holds no deployment, that is for a run that is not finished.

        Args:
            run: W&B's id, the hash of the run folder.
            path: the offline folder, None online.
            config: plain configuration.
            summary: W&B's summary.
            metrics: last value of each metric.
            history: reads every logged number.
            environment: what is known of versions and hardware.
        """
        config = dict(config)
        model, quantizer = config.get("model") or {}, config.get("quantizer") or {}
        deployed = deployments(summary)
        own = {name: value for name, value in metrics.items() if name.rpartition("/")[0] not in deployed}
        fields = {
            "experiment": config.get("name"),
            "hash": run,
            "seed": config.get("seed"),
            "path": path,
            "model": str(model["_target_"]).rpartition(".")[2] if "_target_" in model else None,
            "data": (config.get("data") or {}).get("name"),
            "bits": quantizer.get("bits"),
            "mechanics": sorted(config.get("callbacks") or {}),
            "seconds": summary.get("_runtime"),
            "config": config,
            "metrics": own,
        }
        self._history, self._environment = history, dict(environment)
        self.measurements = []  # they are kept in run folders
        super().__init__(fields, [{"name": name, **numbers} for name, numbers in deployed.items()])

    def history(self) -> list[Metric]:
        """Every logged number."""
        return self._history()

    def environment(self) -> dict[str, Any]:
        """What W&B recorded of versions."""
        return self._environment


def deployments(summary: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The numbers of each deployment in a W&B summary, by deployment."""
    groups: dict[str, dict[str, float]] = {}
    for key, value in summary.items():
        name, slash, number = key.rpartition("/")
        if slash:
            groups.setdefault(name, {})[number] = value
    return {name: numbers for name, numbers in groups.items() if numbers.keys() >= SIGNATURE}


def offline_files(folder: Path) -> list[Path]:
    """The ``.wandb`` files of an offline run's folder, or of a folder that holds such folders, in order of start."""
    own = folder.glob("run-*.wandb")
    inner = (path for path in folder.glob("*run-*/run-*.wandb") if not path.parent.is_symlink())
    return sorted([*own, *inner], key=lambda path: path.parent.name.removeprefix("offline-"))


def offline_runs(files: Iterable[Path]) -> list[WandbRun]:
    """The finished runs in W&B's offline files; the starts of a resumed run make one run.

    Raises:
        ValueError: a damaged file.
    """
    merged: dict[str, tuple[Path, OfflineRun]] = {}
    for path in files:
        start = read_offline(path)
        if start.run in merged:
            start = _continued(merged[start.run][1], start)
        merged[start.run] = (path.parent, start)
    runs = []
    for path, start in merged.values():
        metrics = {row.name: row.value for row in start.history}
        history = start.history
        runs.append(
            WandbRun(start.run, path, start.config, start.summary, metrics, lambda history=history: history, {})
        )
    return [run for run in runs if run.rows]


def _continued(before: OfflineRun, after: OfflineRun) -> OfflineRun:
    """A run and its next start, which logs again what came after the checkpoint it went on from."""
    first = min((row.step for row in after.history), default=None)
    kept = before.history if first is None else [row for row in before.history if row.step < first]
    return OfflineRun(
        after.run, after.name, before.config | after.config, before.summary | after.summary, [*kept, *after.history]
    )


def online_runs(project: str, api: Any = None) -> list[WandbRun]:
    """The finished runs of a W&B project; the history of a run is fetched when it is asked for.

    Args:
        project: ``entity/project``.
        api: a ``wandb.Api``; made where None, which needs a W&B login and a connection.

    Raises:
        ValueError: W&B cannot be reached, or has no such project.
    """
    import wandb

    try:
        found = list((api or wandb.Api()).runs(project))
    except (wandb.errors.Error, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"runs=wandb:{project}: {reason}; log in with 'wandb login' and give wandb:<entity>/<project>"
        ) from error
    return [run for run in (_online(item) for item in found) if run.rows]


def _online(run: Any) -> WandbRun:
    summary = dict(run.summary)
    metrics = {row.name: row.value for row in history_rows(summary)}

    def history() -> list[Metric]:
        return [row for logged in run.scan_history() for row in history_rows(logged)]

    config = {key: value for key, value in run.config.items() if not key.startswith("_")}
    return WandbRun(run.id, None, config, summary, metrics, history, dict(run.metadata or {}))
