"""What the tests of searches for widths share: a budget, a small network with ends of 8 bits, the mechanic on it."""

from typing import Any, TypeVar

from research.learning.mechanic import Mechanic
from research.learning.module import QuantModule
from tests.learning.tiny import LSQ, RESNET, make_module

M = TypeVar("M", bound=Mechanic)
THREE: dict[str, Any] = {"kind": "average_bits", "value": 3, "convention": {"first_last": "excluded"}}
ENDS = {"rules": [{"match": end, "weight": {"bits": 8}, "input": {"bits": 8}} for end in ("@first", "@last")]}


def on_residual(callbacks: dict[str, Any], quantizer: dict[str, Any] | None = None) -> QuantModule:
    """A small residual network, LSQ unless another recipe is given, ends of 8 bits, with these callbacks."""
    return make_module(callbacks, model=RESNET, quantizer=quantizer or {**LSQ, **ENDS})


def only_mechanic(module: QuantModule, kind: type[M]) -> M:
    """The one mechanic of a module."""
    (found,) = module.active
    assert isinstance(found, kind)
    return found
