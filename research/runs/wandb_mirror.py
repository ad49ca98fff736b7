"""The W&B logger of a run that outlives W&B's own process."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger(__name__)


class WandbMirror(WandbLogger):
    """Logs to W&B while its process lives: a signal to all processes of a job ends that one at once, without a word.

    The run needs it for nothing, `metrics.csv` is whole. A requeued run goes on in W&B under the same id.
    """

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)  # type: ignore[arg-type]
        del self._wandb_init["anonymous"]  # Lightning passes None, and W&B warns of the deprecated setting
        self._alive = True

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """As W&B does it, or not at all."""
        if self._alive:
            try:
                super().log_metrics(metrics, step)
            except ConnectionError as error:
                self._lost(error)

    @rank_zero_only
    def finish(self, summary: Mapping[str, float]) -> None:
        """Add the numbers of a finished run and end the W&B run, so that this process can start another one."""
        try:
            self.experiment.summary.update(dict(summary))
            self.experiment.finish()
        except ConnectionError as error:
            if self._alive:
                self._lost(error)
            with suppress(ConnectionError):
                wandb.teardown()
            wandb.run = None  # what W&B would have done last

    def _lost(self, error: ConnectionError) -> None:
        self._alive = False
        log.warning("W&B's process is gone (%s): its record of this start ends here", error)
