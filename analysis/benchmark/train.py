"""Time of one training step in every way a network is run, float and quantized in turn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from analysis.benchmark.interleaved import Clock, interleaved, ratios
from analysis.benchmark.networks import REFERENCE, Way, build_step

GROUPS: dict[str, tuple[Way, ...]] = {
    "eager": (
        Way(bits=32),
        Way(),
        Way(recompute=True),
        Way(execution="quantizers"),
        Way(execution=REFERENCE),
    ),
    "compiled": (Way(bits=32, execution="network"), Way(execution="network")),
    "bf16 compiled": (
        Way(bits=32, execution="network", bf16=True),
        Way(execution="network", bf16=True),
    ),
}
"""What is compared with what: the first of each group is the float network in the same mode."""


def measure(
    rounds: int, batch_size: int, model: str, device: str, clock: Clock, only: str | None = None
) -> dict[str, Any]:
    """By group and way: ``ms``, ``ratio`` to the group's float network, and the quartiles of its rounds.

    Raises:
        ValueError: no group of that name.
    """
    if only is not None and only not in GROUPS:
        raise ValueError(f"only={only}: use one of {', '.join(GROUPS)}")
    found = {}
    for group, ways in GROUPS.items():
        if only in (None, group):
            steps = {way.name: build_step(replace(way, model=model), batch_size, device) for way in ways}
            found[group] = ratios(interleaved(steps, rounds, warmup=3, clock=clock), ways[0].name)
    return found
