"""What a multirun records of its jobs, whatever launcher runs them: a Hydra callback of `conf/train.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from research.config import plain, recorded
from research.error_line import USER_ERRORS
from research.runs.failure import JobFailed, read_failure, write_failure
from research.runs.folder import RunFolder
from research.runs.records import write_config


class SweepRecord(Callback):
    """A failed job of a multirun leaves `failure.json` in its folder of the sweep and in its run folder.

    The run folder is made for it, with its `config.yaml`, where the job failed before there was one; a config that is
    wrong in itself has none. What fails within the run is recorded by `RunFolder.lock`.
    """

    latest: ClassVar[tuple[Path, dict[str, str]] | None] = None
    """Of this process's latest multirun: its folder, and what was typed, by key."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember the multirun; of two overrides of a key, the last one counts."""
        typed = {override.partition("=")[0]: override for override in config.hydra.overrides.task}
        SweepRecord.latest = Path(config.hydra.sweep.dir).absolute(), typed

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Record a failure, in the process of the job."""
        failure = job_return._return_value
        if job_return.status != JobStatus.FAILED or not isinstance(failure, JobFailed):
            return
        overrides = list(job_return.overrides or ())
        write_failure(Path(config.hydra.runtime.output_dir), failure, overrides)
        assert job_return.cfg is not None
        try:
            values = plain(job_return.cfg)
            folder = RunFolder.of(Path(values["paths"]["runs"]), values["name"], values)
        except USER_ERRORS:  # the configuration itself is what is wrong
            return
        if not folder.config_path.is_file():
            write_config(folder.config_path, recorded(values))
            write_config(folder.overrides_path, overrides)
        write_failure(folder.path, failure, overrides)


def failed_jobs(failure: JobFailed) -> list[str]:
    """A line for every failed job of the latest multirun: its number, what was swept of its overrides, its error.

    Args:
        failure: the first one, which is all that is known of a command that keeps no record.
    """
    if SweepRecord.latest is None:
        return [failure.line]
    folder, typed = SweepRecord.latest
    lines = []
    for path in sorted(folder.glob("*/failure.json"), key=lambda path: int(path.parent.name)):
        record = read_failure(path.parent)
        assert record is not None
        swept = " ".join(override for override in record["overrides"] if not _same(override, typed))
        lines.append(f"job {path.parent.name} ({swept}): {record['error']}")
    return lines


def _same(override: str, typed: dict[str, str]) -> bool:
    """Whether a job's override is as it was typed, rather than one of several; Hydra writes ``false`` as ``False``."""
    return typed.get(override.partition("=")[0], "").casefold() == override.casefold()
