"""Variants measured in turn, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, Literal

import torch

Clock = Literal["wall", "processor"]
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
"""``processor``: seconds of this process (its threads added up), on which other processes weigh less."""


def interleaved(
    variants: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 2, clock: Clock = "wall"
) -> dict[str, list[float]]:
    """Seconds of every variant in every round: all run once before any runs again.

    Args:
        variants: what is measured, by name; each call is one sample.
        rounds: samples of each.
        warmup: calls of each that do not count.
        clock: of `CLOCKS`.

    Raises:
        ValueError: no such clock.
    """
    now = clock_of(clock)
    for call in variants.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            _finish()
            start = now()
            call()
            _finish()
            seconds[name].append(now() - start)
    return seconds


def clock_of(clock: str) -> Callable[[], float]:
    """The function that tells the time.

    Raises:
        ValueError: no such clock.
    """
    if clock not in CLOCKS:
        raise ValueError(f"clock={clock}: use one of {', '.join(CLOCKS)}")
    return CLOCKS[clock]


def _finish() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratios(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Every variant beside ``baseline``: ``ms`` (median), ``ratio`` of the medians, and the ``low`` and ``high``
    quartile of the ratios of single rounds.
    """
    base = seconds[baseline]
    result = {}
    for name, values in seconds.items():
        single = sorted(value / other for value, other in zip(values, base, strict=True))
        quarter = len(single) // 4
        result[name] = {
            "ms": 1e3 * median(values),
            "ratio": median(values) / median(base),
            "low": single[quarter],
            "high": single[-1 - quarter],
        }
    return result
