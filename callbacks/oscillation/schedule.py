"""The cosine between two values that starts after a part of the run: strengths and thresholds against oscillation."""

from __future__ import annotations

import math


def annealed(step: int, total: int, start: float, final: float, warmup: float) -> float:
    """``start`` until ``t_s = warmup total``, then ``b + (a - b) (1 + cos(pi (t - t_s) / (T - t_s))) / 2``.

    The schedule of the official code (Qualcomm-AI-research/oscillations-qat) with ``a = start``, ``b = final``.

    Args:
        step: t, counted from 1 at the first step.
        total: T, optimizer steps of the whole run.
        start: value up to ``t_s``.
        final: value at ``T``.
        warmup: part of the run before the cosine, 0 or more and less than 1.
    """
    begin = warmup * total
    if step < begin:
        return start
    return final + 0.5 * (start - final) * (1 + math.cos(math.pi * (step - begin) / (total - begin)))


def check_warmup(slug: str, warmup: float) -> None:
    """Raise ValueError unless ``warmup`` is a part of the run that leaves some of it."""
    if not 0 <= warmup < 1:
        raise ValueError(f"callbacks.{slug}.warmup={warmup}: use 0 or more and less than 1, a part of the run")
