"""The one registry of what conformance covers: every mechanic of conf/callbacks and every quantizer.

A new file in conf/callbacks is covered with its own settings at once; an entry in ``DECLARED`` says what cannot be read
off it: further settings worth running, what disables the mechanic, whether it needs quantized layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from research.learning.mechanic import Mechanic
from research.targets import resolve_target

CONF = Path(__file__).resolve().parents[2] / "conf"


@dataclass(frozen=True)
class Declared:
    """What conformance has to be told about a mechanic.

    Args:
        variants: settings to run it with, on top of its file.
        off: settings with which it is plain training, bit for bit; None if it has none.
        needs_layers: it refuses a network without quantized layers.
    """

    variants: tuple[Mapping[str, Any], ...] = ({},)
    off: Mapping[str, Any] | None = None
    needs_layers: bool = False


@dataclass(frozen=True)
class Case:
    """One mechanic in one variant."""

    slug: str
    config: Mapping[str, Any]
    declared: Declared = field(default_factory=Declared)

    @property
    def mechanics(self) -> dict[str, Any]:
        """The ``callbacks`` part of a run's config."""
        return {self.slug: dict(self.config)}

    def with_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """``mechanics`` with other settings."""
        return {self.slug: {**self.config, **settings}}

    def build(self) -> Mechanic:
        """The mechanic itself."""
        mechanic = resolve_target(self.config, trusted=True, key=f"callbacks.{self.slug}")
        assert isinstance(mechanic, Mechanic)
        return mechanic


DECLARED: dict[str, Declared] = {
    "sam": Declared(
        variants=({}, {"adaptive": True, "rho": 0.5, "statistics": "all", "sync_perturbation": True}),
        off={"rho": 0.0},
    ),
    "distillation": Declared(variants=({}, {"temperature": 4.0, "task_weight": 0.5}), off={"weight": 0.0}),
}


def mechanic_cases() -> dict[str, Case]:
    """All cases by name, ``<slug>-<number of the variant>``."""
    cases = {}
    for path in sorted((CONF / "callbacks").glob("*.yaml")):
        slug, declared = path.stem, DECLARED.get(path.stem, Declared())
        for number, settings in enumerate(declared.variants):
            config = {**yaml.safe_load(path.read_text())[slug], **settings}
            cases[f"{slug}-{number}"] = Case(slug, config, declared)
    return cases


MECHANICS = mechanic_cases()
FIRST = {case.slug: case for name, case in MECHANICS.items() if name.endswith("-0")}
