"""Other quantization libraries beside float and our own training step, each in a process of its own.

Those that torch does not bring are installed into an environment of their own (they pin old versions of common
packages); one that cannot be installed or run is left out, and the record says why.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from analysis.benchmark.interleaved import Clock, ratios
from analysis.benchmark.networks import Way, config_of
from analysis.benchmark.peer_worker import FLOAT, PEERS, Request

PACKAGES: dict[str, tuple[str, ...]] = {
    "Brevitas": ("brevitas==0.13.4", "dependencies==2.0.1", "setuptools<81"),
    "torchao PT2E": ("torchao==0.18.0",),
}
"""What a peer needs besides torch; those that are not named come with torch and run in our own environment."""

COMMON = ("numpy", "safetensors")
"""What our float networks need besides torch."""

INSTALL_SECONDS = 1800
ROOT = Path(__file__).parents[2]


class Unavailable(Exception):
    """A peer cannot be measured here; the message says why, in one line."""


def default_folder() -> Path:
    """Where the environment is kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flatbit" / "peers"


def run(command: list[str], text: str | None = None, timeout: float | None = None) -> str:
    """Output of a process that can import this repository.

    Raises:
        Unavailable: it failed, with the last line of what it said.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(" ".join(str(error).split())) from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        raise Unavailable(said.splitlines()[-1])
    return done.stdout


def environment_python(folder: Path) -> str:
    """The interpreter of the environment in ``folder``, made where it is not there; torch is the first thing in it.

    Raises:
        Unavailable: it cannot be made, or its torch is not the one that runs here.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        run([sys.executable, "-m", "venv", str(folder)], timeout=INSTALL_SECONDS)
    install(str(python), *COMMON)
    found = run([str(python), "-c", "import torch; print(torch.__version__)"]).strip()
    if found != torch.__version__:
        raise Unavailable(f"{folder} has torch {found}, this process {torch.__version__}")
    return str(python)


def install(python: str, *packages: str) -> None:
    """Install ``packages`` beside this very version of torch."""
    version = torch.__version__.partition("+")[0]  # which build of it, the package index decides
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, f"torch=={version}"], timeout=INSTALL_SECONDS)
    run([*pip, f"torch=={version}", *packages], timeout=INSTALL_SECONDS)


def interpreter(peer: str, folder: Path) -> str:
    """The Python that can import ``peer``."""
    if peer not in PACKAGES:
        return sys.executable
    python = environment_python(folder)
    install(python, *PACKAGES[peer])
    return python


def beside(request: Request, folder: Path) -> dict[str, Any]:
    """One peer's measurement.

    Raises:
        Unavailable: it cannot be made.
    """
    command = [interpreter(request.peer, folder), "-m", "analysis.benchmark.peer_worker"]
    found = json.loads(run(command, json.dumps(asdict(request))).splitlines()[-1])
    networks = ratios(found["seconds"], FLOAT)
    saved = found["saved_bytes"]
    for name, cell in networks.items():
        cell |= {"saved_mib": saved[name] / 2**20, "saved_ratio": saved[name] / saved[FLOAT]}
    return {"version": found["version"], "form": found["form"], "networks": networks}


def measure(
    rounds: int,
    batch_size: int,
    model: str,
    bits: int,
    device: str,
    clock: Clock,
    folder: str | None = None,
    only: str | None = None,
) -> dict[str, Any]:
    """``measured`` by peer (``version``, ``form``, ``networks``: time and memory as ratios to float in the same
    process) and ``skipped`` by peer (why).

    Raises:
        ValueError: no peer of that name.
    """
    if only is not None and only not in PEERS:
        raise ValueError(f"only={only}: use one of {', '.join(PEERS)}")
    recipe = config_of(Way(bits=bits, model=model))["quantizer"]
    measured, skipped = {}, {}
    for peer in PEERS:
        if only in (None, peer):
            request = Request(peer, recipe, model, bits, rounds, batch_size, torch.get_num_threads(), clock, device)
            try:
                measured[peer] = beside(request, default_folder() if folder is None else Path(folder))
            except Unavailable as reason:
                skipped[peer] = str(reason)
    return {"measured": measured, "skipped": skipped}
