"""Values of measurements by name: ``measurement:<kind>[<setting>=<value>,...].<path>``.

``measurement:curvature[surface=latent].trace`` is the value ``trace`` of the run's ``curvature`` measurement whose
settings say ``surface: latent``, of the row's deployment unless ``deployment=`` names another; keys of the path may
hold dots themselves, numbers index lists. A mapping with a ``value`` stands for it, and what is marked
``converged: false`` is never shown without that mark.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from analysis.rows import Row, label
from research.runs.measurements import Measurement


@dataclass(frozen=True)
class Unconverged:
    """A number whose estimate did not converge."""

    value: float


@dataclass(frozen=True)
class Selector:
    """A parsed name."""

    PREFIX: ClassVar[str] = "measurement:"
    FORM: ClassVar[str] = "measurement:<kind>[<setting>=<value>].<path>, such as measurement:curvature.trace"

    name: str
    kind: str
    settings: tuple[tuple[str, str], ...]
    path: str

    @classmethod
    def parse(cls, name: str) -> Selector:
        """Read a name.

        Raises:
            ValueError: it has another form.
        """
        found = re.fullmatch(rf"{cls.PREFIX}(\w+)(?:\[([^\]]+)\])?\.(.+)", name)
        pairs = [tuple(pair.split("=", 1)) for pair in (found[2] or "").split(",") if pair] if found else [()]
        if found is None or not all(len(pair) == 2 for pair in pairs):
            raise ValueError(f"columns={name}: use {cls.FORM}")
        return cls(name, found[1], tuple((key, value) for key, value in pairs), found[3])

    def value(self, row: Row, missing: Any) -> Any:
        """The value for a row: a number, text, an `Unconverged`, or ``missing`` where nothing was measured.

        Raises:
            ValueError: several measurements fit, or the path leads to no single value.
        """
        fitting = [m for m in row["run"].measurements if m["kind"] == self.kind and self._fits(m, row)]
        found = [leaf for m in fitting for leaf in descend(m["values"], self.path)]
        if not found:
            return missing
        if len(found) > 1:
            raise ValueError(f"columns={self.name}: {len(found)} values in {label(row)}; {differences(fitting)}")
        leaf, converged = found[0]
        if isinstance(leaf, Mapping) and "value" in leaf:
            converged, leaf = converged and leaf.get("converged", True), leaf["value"]
        if isinstance(leaf, Mapping | list):
            inner = leaf if isinstance(leaf, Mapping) else range(len(leaf))
            raise ValueError(f"columns={self.name}: no single value; go on with .{' or .'.join(map(str, inner))}")
        return leaf if converged else Unconverged(leaf)

    def _fits(self, measurement: Measurement, row: Row) -> bool:
        """Whether the settings are those of the name; the deployment is the row's unless the name has another one."""
        settings = {"deployment": row["name"], **measurement["settings"]}
        wanted = {"deployment": row["name"], **dict(self.settings)}
        return all(str(settings.get(key)) == value for key, value in wanted.items())


def descend(tree: Any, path: str, converged: bool = True) -> Iterator[tuple[Any, bool]]:
    """The values at a dotted path, each with whether every mapping on the way has converged.

    Args:
        tree: nested mappings and lists.
        path: keys joined by dots; a key may hold dots, a number indexes a list.
        converged: what is known from above.
    """
    if isinstance(tree, list):
        head, _, rest = path.partition(".")
        tree, path = ({head: tree[int(head)]}, path) if head.isdigit() and int(head) < len(tree) else ({}, path)
    if not isinstance(tree, Mapping):
        return
    converged = converged and tree.get("converged", True) is not False
    for key, value in tree.items():
        if path == key:
            yield value, converged
        elif path.startswith(f"{key}."):
            yield from descend(value, path[len(key) + 1 :], converged)


def differences(measurements: Sequence[Measurement]) -> str:
    """How to tell measurements of one kind apart, for a message."""
    keys = {key for measurement in measurements for key in measurement["settings"]}
    values = {key: {str(m["settings"].get(key)) for m in measurements} for key in sorted(keys)}
    telling = [f"[{key}={min(found)}]" for key, found in values.items() if len(found) > 1]
    return f"choose by settings, such as {' or '.join(telling)}" if telling else "their weights differ: delete old ones"
