"""The end of a run: training-time state becomes exact networks, measured as they will be deployed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from research.learning.module import QuantModule
from research.learning.tasks import Task
from research.quant.batchnorm import reestimate_batchnorm

SINGLE = "final"


def finalise(module: QuantModule, batches: Sequence[Tensor] = ()) -> dict[str, nn.Module]:
    """Finalised copies of the module's network by deployment name; the module itself stays as it is.

    Args:
        module: the host, with the weights to finalise.
        batches: inputs for the re-estimation of batch-norm statistics; none: statistics as trained.

    Returns:
        ``{"final": net}``, or the several deployments that a mechanic makes (each named by it).

    Raises:
        ValueError: two mechanics make deployments.
    """
    net = module.plain_copy()
    made: dict[str, nn.Module] = {}
    owner = ""
    for mechanic in module.active:
        several = mechanic.finalise(net)
        if several is not None and made:
            raise ValueError(f"callbacks.{mechanic.slug} and callbacks.{owner} both make deployments: drop one of them")
        if several is not None:
            made, owner = dict(several), mechanic.slug
    deployments = made or {SINGLE: net}
    for deployed in deployments.values():
        if batches:
            reestimate_batchnorm(deployed, batches)
        deployed.eval()
    return deployments


@torch.no_grad()
def measure(net: nn.Module, task: Task, batches: Iterable[Any]) -> dict[str, float]:
    """The task's loss (mean over samples) and metrics of ``net`` in evaluation mode, e.g. ``accuracy`` 0 to 1."""
    metrics = task.metrics("")
    device = next(net.parameters()).device
    metrics.to(device)
    net.eval()
    total, seen = 0.0, 0
    for batch in batches:
        outputs, loss = task.evaluate(net, batch)
        targets = task.targets(batch)
        metrics.update(outputs, targets)
        total += float(loss) * len(targets)
        seen += len(targets)
    values: Mapping[str, Tensor] = metrics.compute()
    return {"loss": total / seen, **{name: float(value) for name, value in values.items()}}
