"""The end of a run: training-time state becomes exact networks, measured as they will be deployed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from research.learning.module import QuantModule
from research.learning.tasks import Task
from research.quant.batchnorm import reestimate_batchnorm
from research.quant.conv_bn import merge_batchnorm

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
    deployments: dict[str, nn.Module] = {SINGLE: module.plain_copy()}
    owner = ""
    for mechanic in module.active:
        made = [mechanic.finalise(net) for net in deployments.values()]
        if made[0] is None:
            continue
        if owner:
            raise ValueError(f"callbacks.{owner} and callbacks.{mechanic.slug} both make deployments: drop one of them")
        deployments, owner = dict(made[0]), mechanic.slug
    for deployed in deployments.values():
        if batches:
            reestimate_batchnorm(deployed, batches)
        merge_batchnorm(deployed)
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
