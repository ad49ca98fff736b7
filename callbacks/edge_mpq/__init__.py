"""Edge-MPQ: step and range of every quantizer are trained, widths follow from them, a penalty keeps to the budgets."""

from callbacks.edge_mpq.mechanic import EdgeMPQ
from callbacks.edge_mpq.quantizer import StepRange

__all__ = ["EdgeMPQ", "StepRange"]
