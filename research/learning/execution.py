"""How a network is run while it trains: compiled as a whole, its quantizers compiled, or eager; always the fast path
that gives the derivatives which the mechanics need."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, get_args

import torch

from research.learning.mechanic import Mechanic
from research.models.structure import FloatModel
from research.quant.compiler import cache_derivatives, compiler_options
from research.quant.passes import use_kernels
from research.quant.rectified import leave_out_relus

Execution = Literal["none", "quantizers", "network"]
EXECUTIONS: tuple[Execution, ...] = get_args(Execution)
COMPILE = (*EXECUTIONS, "auto")

PAYS_BACK: dict[Execution, int] = {"network": 800, "quantizers": 400}
"""Optimizer steps from which compiling is faster in all (a cold compiler's cache, ResNet-20 at batch size 128)."""

log = logging.getLogger(__name__)


def choose_execution(compile: str, steps: int, mechanics: Sequence[Mechanic], compiler: bool) -> Execution:
    """What ``compile`` means for a run.

    ``auto`` compiles the whole network where the mechanics allow it and the run is long enough to pay for it, else the
    quantizers where that pays, else nothing.

    Args:
        compile: ``none``, ``quantizers``, ``network`` or ``auto``.
        steps: optimizer steps of the whole run.
        mechanics: all mechanics of the run.
        compiler: whether this machine can compile at all.
    """
    for execution in EXECUTIONS:
        if compile == execution:
            return execution
    if not compiler or any(mechanic.needs_double_backward for mechanic in mechanics):
        return "none"
    return next((execution for execution, least in PAYS_BACK.items() if steps >= least), "none")


def execute_as(net: FloatModel, execution: Execution, mechanics: Sequence[Mechanic]) -> str:
    """Run ``net`` so from now on; a line that says how.

    The whole network is compiled with quantizers that the compiler fuses into the layers around them. Evaluations
    whose second derivatives a mechanic takes are in a form that has them (`twice_differentiable`).
    """
    if execution == "network":
        use_kernels(net, "traced")
        cache_derivatives()
        options = compiler_options(torch.get_num_threads())
        net.compile(options={**options, "fallback_random": True})  # noise as in eager mode; faster on CPUs
        return "execution: the whole network compiled"
    use_kernels(net, "compiled" if execution == "quantizers" else "eager")
    leave_out_relus(net, net.structure().activation_layer)
    line = f"execution: eager, fused quantizers{' compiled' if execution == 'quantizers' else ''}"
    needing = [f"callbacks.{mechanic.slug}" for mechanic in mechanics if mechanic.needs_double_backward]
    return f"{line}; twice differentiable where {', '.join(needing)} asks for it" if needing else line
