"""Loggers of a run: the metrics record, always; W&B beside it, offline unless told otherwise."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from research.runs.files import writing
from research.runs.folder import RunFolder
from research.runs.records import MetricsRecord, read_summary

if TYPE_CHECKING:
    from research.runs.wandb_mirror import WandbMirror

WANDB_MODES = ("offline", "online", "disabled")


class RunLogger(Logger):
    """Lightning logger that writes what is logged to the run folder's `metrics.csv`, on rank zero only."""

    def __init__(self, folder: RunFolder) -> None:
        super().__init__()
        self.folder = folder
        self._record: MetricsRecord | None = None

    @property
    def name(self) -> str:
        """The experiment."""
        return self.folder.experiment

    @property
    def version(self) -> str:
        """The hash of the configuration."""
        return self.folder.hash

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.folder.path)

    @property
    def record(self) -> MetricsRecord:
        """The record, opened at its first use."""
        if self._record is None:
            self._record = MetricsRecord(self.folder.metrics_path)
        return self._record

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row per metric; `epoch` among the metrics becomes the epoch column."""
        values = dict(metrics)
        epoch = values.pop("epoch", None)
        self.record.append(step or 0, None if epoch is None else int(epoch), values)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: `config.yaml` has them."""

    @rank_zero_only
    def truncate_after(self, step: int) -> None:
        """Drop what a killed run logged after the `step` (from 0) that its checkpoint ends with."""
        self.record.truncate_after(step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the record; a later `log_metrics` opens it again."""
        if self._record is not None:
            self._record.close()
            self._record = None


def written_folders(trainer: pl.Trainer) -> list[Path]:
    """The run folder, for what a callback writes into it: on the first rank; none where the Trainer has no run."""
    if not trainer.is_global_zero:
        return []
    return [logger.folder.path for logger in trainer.loggers if isinstance(logger, RunLogger)]


def wandb_logger(
    folder: RunFolder,
    config: Mapping[str, Any],
    mode: str = "offline",
    project: str = "flatbit",
    directory: Path | str | None = None,
) -> "WandbMirror | None":
    """The W&B logger of a run, or None for `mode=disabled`; one W&B run per run folder, resumed under the run's hash.

    `offline` opens no connection; `wandb sync` uploads later. A killed and resumed run leaves one offline folder per
    start, all with the same id. Raises ValueError naming `logger.wandb.mode` or `logger.wandb.dir`.
    """
    if mode not in WANDB_MODES:
        raise ValueError(f"logger.wandb.mode={mode}: use one of {', '.join(WANDB_MODES)}")
    if mode == "disabled":
        return None
    save_dir = folder.path if directory is None else Path(directory).absolute()
    with writing(save_dir, key="logger.wandb.dir"):
        (save_dir / "wandb").mkdir(parents=True, exist_ok=True)
        probe = save_dir / "wandb" / ".probe"
        probe.write_bytes(b"\0")
        probe.unlink(missing_ok=True)  # another rank's may have been faster
    import wandb

    from research.runs.wandb_mirror import WandbMirror

    # mode goes to wandb.init: WandbLogger's own offline=True would set WANDB_MODE for every later run of the process
    return WandbMirror(
        name=f"{folder.experiment}/{folder.hash}",
        id=folder.hash,
        save_dir=save_dir,
        project=project,
        resume="allow",
        mode=mode,
        settings=wandb.Settings(quiet=True),
        config=dict(config),
    )


@rank_zero_only
def finish_wandb(logger: "WandbMirror | None", folder: RunFolder) -> None:
    """End the W&B run, with the numbers of a finished run's summary, so that a multirun's next job starts its own."""
    if logger is None:
        return
    summary: dict[str, float] = {}
    if folder.finished:
        for row in read_summary(folder.summary_path)["deployments"]:
            numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
            summary |= {f"{row['name']}/{key}": value for key, value in numbers.items()}
    logger.finish(summary)
