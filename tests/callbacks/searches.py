"""What the tests of searches for widths share: a budget, a small network with ends of 8 bits, the mechanic on it."""

from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl

from research.learning.mechanic import Mechanic
from research.learning.module import QuantModule
from research.learning.prepare import Preparation
from research.quant.allocation import Allocation
from research.runs.allocation import ALLOCATION, read_allocation
from research.runs.folder import RunFolder
from research.runs.logger import RunLogger
from research.runs.records import read_config
from tests.learning.tiny import LSQ, RESNET, make_data, make_module

M = TypeVar("M", bound=Mechanic)
THREE: dict[str, Any] = {"kind": "average_bits", "value": 3, "convention": {"first_last": "excluded"}}
ENDS = {"rules": [{"match": end, "weight": {"bits": 8}, "input": {"bits": 8}} for end in ("@first", "@last")]}


def on_residual(callbacks: dict[str, Any], quantizer: dict[str, Any] | None = None) -> QuantModule:
    """A small residual network, LSQ unless another recipe is given, ends of 8 bits, with these callbacks."""
    return make_module(callbacks, model=RESNET, quantizer=quantizer or {**LSQ, **ENDS})


def only_mechanic(module: QuantModule, kind: type[M]) -> M:
    """The one mechanic of a module."""
    (found,) = module.active
    assert isinstance(found, kind)
    return found


def allocation_left(module: QuantModule, runs: Path) -> tuple[Allocation, QuantModule]:
    """Fit a residual network for an epoch in a run folder: the allocation that stands there then, and a network made
    with it, whose widths are those.
    """
    folder = RunFolder.of(runs, "search", {})
    folder.path.mkdir(parents=True)
    pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_checkpointing=False,
        logger=RunLogger(folder),
        callbacks=[Preparation(1, 16)],
    ).fit(module, datamodule=make_data())
    left = read_allocation(folder.path / ALLOCATION)
    retrained = make_module(model=RESNET, quantizer={"table": read_config(folder.path / ALLOCATION)})
    assert Allocation.of(retrained.net) == left
    return left, retrained
