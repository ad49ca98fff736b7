"""What compiling costs before the first step: with an empty cache and with the cache of an earlier process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from typing import Any

from analysis.benchmark.networks import Way

WAYS = (
    Way(),
    Way(execution="quantizers"),
    Way(bits=32, execution="network"),
    Way(execution="network"),
    Way(execution="network", bf16=True),
)


def first_step_seconds(way: Way, batch_size: int, cache: str) -> float:
    """Seconds of a process of its own from its start to the end of its first training step."""
    code = (
        f"from analysis.benchmark.networks import Way, build_step\nbuild_step(Way(**{asdict(way)!r}), {batch_size})()\n"
    )
    start = time.perf_counter()
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)
    return time.perf_counter() - start


def measure(batch_size: int, model: str) -> dict[str, Any]:
    """By way: ``cold_s`` and ``warm_s``."""
    found = {}
    for way in (replace(way, model=model) for way in WAYS):
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = (first_step_seconds(way, batch_size, cache) for _ in range(2))
        found[way.name] = {"cold_s": cold, "warm_s": warm}
    return found
