"""Without a progress bar, every epoch leaves one line with step and validation metrics."""

import logging

import pytest

from research.learning.epoch_line import EpochLine
from tests.learning.tiny import fit, make_module


def test_a_line_an_epoch(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="research.learning.epoch_line"):
        trainer = fit(make_module(), callbacks=(EpochLine(),))
    first, second = [record.getMessage() for record in caplog.records if record.name.endswith("epoch_line")]
    assert first.startswith("epoch 1, step 4/8, val/loss ")
    accuracy = float(trainer.callback_metrics["val/accuracy"])
    assert second.startswith("epoch 2, step 8/8, ") and second.endswith(f"val/accuracy {accuracy:.4f}")
