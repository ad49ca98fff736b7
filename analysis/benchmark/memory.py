"""What a training step keeps for its backward pass, and how much memory a process needs for it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

import torch

from analysis.benchmark.networks import REFERENCE, Step, Way, build_step
from analysis.benchmark.saved import SavedMemory

WAYS = (
    Way(bits=32),
    Way(),
    Way(recompute=True),
    Way(execution=REFERENCE),
    Way(bits=32, execution="network"),
    Way(execution="network"),
    Way(execution="network", bf16=True),
)


def saved_bytes(step: Step) -> int:
    """Bytes of the tensors that the backward pass of one step keeps, parameters left out, shared memory once."""
    parameters = list(step.module.net.parameters())
    if step.way.recompute:
        loss, recorder = step.forward()
        assert recorder is not None
        total = recorder.saved_bytes({parameter.data_ptr() for parameter in parameters})
    else:
        with SavedMemory(parameters) as saved:
            loss, _ = step.forward()
        total = saved.kept
    loss.backward()
    return total


def peak_bytes(way: Way, batch_size: int) -> int:
    """Peak resident memory of a process of its own that trains three steps, compilers and libraries included.

    Of Linux' own count: what ``getrusage`` says of a process that was just forked starts at its parent's peak.
    """
    code = (
        "from pathlib import Path\n"
        "from analysis.benchmark.networks import Way, build_step\n"
        f"step = build_step(Way(**{asdict(way)!r}), {batch_size})\n"
        "for _ in range(3): step()\n"
        "status = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())\n"
        "print(int(status['VmHWM'].split()[0]) * 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return int(done.stdout.splitlines()[-1])


def measure(batch_size: int, model: str, device: str) -> dict[str, Any]:
    """By way: ``saved_mib``, ``ratio`` to the float network run eagerly, and the process's peak (CPU) or the GPU's."""
    found: dict[str, Any] = {}
    for way in (replace(way, model=model) for way in WAYS):
        step = build_step(way, batch_size, device)
        step()
        saved = saved_bytes(step) / 2**20
        if device == "cpu":
            peak = peak_bytes(way, batch_size)
        else:
            torch.cuda.reset_peak_memory_stats()
            step()
            peak = torch.cuda.max_memory_allocated()
        first = next(iter(found.values()))["saved_mib"] if found else saved
        found[way.name] = {"saved_mib": saved, "ratio": saved / first, "peak_mib": peak / 2**20}
    return found
