"""Two processes with every mechanic: ranks agree, and a mechanic declared ``exact`` equals one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from tests.conformance.ddp import MODEL, STEPS, train
from tests.conformance.registry import CONF, MECHANICS, measured
from tests.learning.tiny import float_weights

DRAWN = "mechanics.drawing.drawn"


def train_in_two_processes(folder: Path) -> None:
    """What each rank trained with every case, as ``<case>.<rank>.pt`` in ``folder``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.conformance.ddp", str(folder)],
            cwd=CONF.parent,
            env={**os.environ, **common, "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors


def farthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest distance between two states; infinite where their names differ."""
    if one.keys() != other.keys():
        return float("inf")
    return max(float((one[key].double() - other[key].double()).abs().max()) for key in one if one[key].numel())


def test_ranks_agree_and_an_exact_mechanic_equals_one_process(tmp_path: Path) -> None:
    weights = float_weights(tmp_path / "float.safetensors", MODEL)
    train_in_two_processes(tmp_path)
    faults = {}
    for name, case in MECHANICS.items():
        first, second = (torch.load(tmp_path / f"{name}.{rank}.pt", weights_only=True) for rank in (0, 1))
        alone = train(name, weights)
        faults[name, "ranks differ by"] = farthest(first, second)
        faults[name, "decisions differ by"] = float((first[DRAWN] - alone[DRAWN]).abs().max())
        assert int((first[DRAWN] > 0).sum()) == STEPS
        assert case.epochs == 1 or measured(first), f"{name} measured no curvature"
        if case.build().ddp == "exact":
            distance = farthest(first, alone)
            faults[name, "differs from one process by"] = distance if distance > 1e-6 else 0.0
    assert {what: distance for what, distance in faults.items() if distance} == {}
