"""The one registry of what conformance covers: every mechanic of conf/callbacks and every quantizer.

A new file in conf/callbacks is covered with its own settings at once. A file of the same name in
tests/conformance/declared says what cannot be read off it: further settings worth running, what disables the mechanic,
which network it needs (the fields of ``Declared``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from research.learning.hessian_scale import HessianScale
from research.learning.mechanic import Mechanic
from research.quant.quantizers import quantizer_class
from research.targets import resolve_target
from tests.learning.tiny import LSQ

CONF = Path(__file__).resolve().parents[2] / "conf"
DECLARED = Path(__file__).parent / "declared"
BITS = 4


@dataclass(frozen=True)
class Declared:
    """What conformance has to be told about a mechanic.

    Args:
        variants: settings to run it with, on top of its file; the first stands for the mechanic where one is enough.
        off: settings with which it is plain training, bit for bit; None if it has none.
        needs_layers: it refuses a network without quantized layers.
        quantizer: the recipe that it is made for; None if it works with the LSQ of all tests.
    """

    variants: Sequence[Mapping[str, Any]] = ({},)
    off: Mapping[str, Any] | None = None
    needs_layers: bool = False
    quantizer: Mapping[str, Any] | None = None


def measured(state: Mapping[str, Tensor]) -> bool:
    """Whether curvature was measured: the strengths of all quantizers are one number before, many afterwards."""
    return len({float(value) for name, value in state.items() if name.endswith("quantizer.delta")}) > 1


@dataclass(frozen=True)
class Case:
    """One mechanic in one variant."""

    slug: str
    config: Mapping[str, Any]
    declared: Declared

    @property
    def mechanics(self) -> dict[str, Any]:
        """The ``callbacks`` part of a run's config."""
        return {self.slug: dict(self.config)}

    @property
    def off(self) -> dict[str, Any]:
        """``mechanics``, switched off."""
        return {self.slug: {**self.config, **(self.declared.off or {})}}

    @property
    def quantizer(self) -> dict[str, Any]:
        """The recipe to train it with."""
        return dict(self.declared.quantizer or LSQ)

    @property
    def settings(self) -> dict[str, Any]:
        """Mechanics and recipe, for ``make_module``."""
        return {"mechanics": self.mechanics, "quantizer": self.quantizer}

    @property
    def epochs(self) -> int:
        """Epochs in which it does all that it does; curvature is measured in front of every one but the first."""
        measuring = [value for value in vars(self.build()).values() if isinstance(value, HessianScale)]
        return 2 if any(scale.every_n_epochs == 1 for scale in measuring) else 1

    def build(self) -> Mechanic:
        """The mechanic itself."""
        mechanic = resolve_target(self.config, trusted=True, key=f"callbacks.{self.slug}")
        assert isinstance(mechanic, Mechanic)
        return mechanic


def read_yaml(path: Path) -> dict[str, Any]:
    """A config file as plain containers, with numbers as Hydra reads them (``1e-3`` is one)."""
    config = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(config, dict)
    return {"off" if key is False else str(key): value for key, value in config.items()}  # off is a boolean in YAML


def recipe(name: str) -> dict[str, Any]:
    """A quantizer's own file, at one width everywhere."""
    bits = min(BITS, quantizer_class(name).max_bits)
    config = {"quantizer": {**read_yaml(CONF / f"quantizer/{name}.yaml"), "bits": bits, "rules": []}}
    resolved: Any = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    return dict(resolved["quantizer"])


def read_declared(path: Path) -> Declared:
    """What a file declares, and nothing out of the ordinary where there is none; unknown keys are a TypeError."""
    return Declared(**read_yaml(path)) if path.is_file() else Declared()


def mechanic_cases() -> dict[str, Case]:
    """All cases by name, ``<slug>-<number of the variant>``."""
    cases = {}
    for path in sorted((CONF / "callbacks").glob("*.yaml")):
        slug, declared = path.stem, read_declared(DECLARED / path.name)
        own = read_yaml(path)[slug]
        for number, settings in enumerate(declared.variants):
            cases[f"{slug}-{number}"] = Case(slug, {**own, **settings}, declared)
    return cases


MECHANICS = mechanic_cases()
FIRST = {case.slug: case for name, case in MECHANICS.items() if name.endswith("-0")}
