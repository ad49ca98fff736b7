"""What a measurement is taken on: the finalised network of a run, its task, and training images that are always the
same."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from analysis.collect import Row
from analysis.labels import method_name, widths_name
from research.curvature.batches import FixedBatches
from research.learning.evaluation import Network
from research.learning.tasks import Task
from research.results import finished_network, recorded_data
from research.runs.folder import RunFolder
from research.runs.records import read_config
from research.targets import resolve_target

DATA = os.environ.get("FLATBIT_DATA", "data")
"""Default of the option ``data``: the folder of the data sets."""


@dataclass(frozen=True)
class Subject:
    """A network and what its loss is measured on.

    Attributes:
        net: the finalised network, in evaluation mode.
        task: the run's task.
        batches: training images without augmentation.
    """

    net: nn.Module
    task: Task
    batches: FixedBatches

    def loss(self, network: Network, batch: Any) -> Tensor:
        """The task's mean loss of ``network`` on a batch."""
        return self.task.evaluate(network, batch)[1]


def subject(folder: RunFolder, deployment: str, images: int, batch_size: int, data: str) -> Subject:
    """The network of a deployment with the first measurement images of its run's training part.

    Args:
        folder: a finished run with its weights.
        deployment: which of its networks.
        images: how many training images.
        batch_size: images at a time.
        data: folder of the data sets.

    Raises:
        ValueError: weights or data are missing, or there are fewer images.
    """
    source = recorded_data(folder, {"data": data})
    task = resolve_target(read_config(folder.config_path)["task"], key="task")
    return Subject(finished_network(folder, deployment), task, FixedBatches.of(source, images, batch_size))


def run_folder(row: Row) -> RunFolder:
    """The run folder of a row.

    Raises:
        ValueError: the row does not come from a run folder.
    """
    if row["path"] is None or not (row["path"] / "config.yaml").is_file():
        raise ValueError(f"runs=: {row['experiment']}/{row['hash']} is no run folder; only those hold weights")
    return RunFolder.existing(row["path"])


def use_threads(count: int | None) -> None:
    """Compute on ``count`` threads from now on; None leaves torch's own choice. Raises ValueError below 1."""
    if count is None:
        return
    if count < 1:
        raise ValueError(f"threads={count}: use 1 or more, or null")
    torch.set_num_threads(count)


def listed(key: str, value: Any) -> list[Any]:
    """An option that is a list, or one element of it alone.

    Raises:
        ValueError: an empty list, naming ``key``.
    """
    if value == []:
        raise ValueError(f"{key}=[]: give one value or more")
    return list(value) if isinstance(value, list) else [value]


def names(rows: Sequence[Row]) -> list[str]:
    """A name for each row by method and bits; with seed, deployment and hash as far as they tell rows apart."""
    found = [f"{method_name(row)}, {widths_name(row)}" for row in rows]
    for key, form in (("name", "{}"), ("seed", "seed {}"), ("hash", "{}")):
        if len(set(found)) < len(rows) and len({row[key] for row in rows}) > 1:
            found = [f"{name}, {form.format(row[key])}" for name, row in zip(found, rows, strict=True)]
    return found
