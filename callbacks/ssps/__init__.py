"""SSPS: bits per layer by a sequential single-path search, one candidate executed at a time, certain layers first."""

from callbacks.ssps.mechanic import SSPS

__all__ = ["SSPS"]
