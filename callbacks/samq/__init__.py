"""SAMQ: SAQ's configuration generator, bits per layer drawn by a policy that learns from the loss and the cost."""

from callbacks.samq.mechanic import SAMQ

__all__ = ["SAMQ"]
