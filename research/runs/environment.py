"""Environment snapshot: what a number was computed with; no paths, host names or user names."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "flatbit", "torch", "lightning", "torchmetrics", "hydra-core", "omegaconf", "numpy", "safetensors",
    "hessian-eigenthings", "wandb", "onnx", "onnxruntime",
)  # fmt: skip


def snapshot() -> dict[str, Any]:
    """Versions, hardware, source revision and time (UTC) as plain containers for `environment.json`."""
    cuda = torch.cuda.is_available()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpu_instructions": _cpu_instructions(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if cuda else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "packages": {name: _version(name) for name in PACKAGES},
        "git": source_revision(Path(__file__).parents[2]),
    }


def cpu_convolves_bf16() -> bool:
    """Whether this CPU has instructions with which oneDNN convolves bfloat16 (AVX-512 or newer on x86).

    Without them torch falls back to loops of its own: a compiled bf16 step of ResNet-20 took 15 times the float32 step.
    """
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def source_revision(root: Path) -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout whose top folder is `root`; None where `root` is no such checkout."""
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    if top is None or commit is None or Path(top).resolve() != root.resolve():
        return None
    return {"commit": commit, "dirty": _git(root, "status", "--porcelain") != ""}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_instructions() -> str:
    """Vector instructions in use, such as ``AVX512 bf16``: they tell apart processors that share a model's name."""
    return torch.backends.cpu.get_cpu_capability() + (" bf16" if cpu_convolves_bf16() else "")


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
