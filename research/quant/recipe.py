"""Recipe: which quantizer goes where, as plain data: three defaults, ordered rules, or a table of an earlier run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from research.quant.quantizers.base import MAX_BITS, WIDTHS, QuantizerSpec

FLOAT_BITS = 32
SLOT_KEYS = ("weight", "input", "output")
RECIPE_KEYS = (*SLOT_KEYS, "rules", "outputs", "replace", "table", "widths", "fold_bn", "bits")

Settings = Mapping[str, Any]
LayerSpecs = dict[str, QuantizerSpec | None]
Table = dict[str, LayerSpecs]


@dataclass(frozen=True)
class Rule:
    """Settings for the layers whose whole name ``match`` matches (a regular expression, or ``@first``/``@last``)."""

    match: str
    settings: Mapping[str, Settings | None]

    def matches(self, name: str, first: str, last: str) -> bool:
        """Whether the rule speaks of layer ``name``."""
        if self.match in ("@first", "@last"):
            return name == (first if self.match == "@first" else last)
        return re.fullmatch(self.match, name) is not None


@dataclass(frozen=True)
class Recipe:
    """Weight, input and output quantizers of every layer.

    Args:
        weight, input, output: default settings of a slot (fields of ``QuantizerSpec``), None for no quantizer.
        rules: ordered; every rule that matches a layer changes the settings named in it, later rules win.
        outputs: rules for quantizers on the output of any parameter-free module (activation, residual add).
        replace: pairs (regular expression, ``{_target_: ...}``) for exchanging parameter-free modules.
        table: resolved settings by layer, in place of defaults and rules.
        widths: widths that get a state of their own (scales and batch-norm).
        fold_bn: strategy 0 to 4 of folding batch-norms into convolutions, None for no folding.
    """

    weight: Settings | None = None
    input: Settings | None = None
    output: Settings | None = None
    rules: Sequence[Rule] = ()
    outputs: Sequence[Rule] = ()
    replace: Sequence[tuple[str, Settings]] = ()
    table: Mapping[str, Mapping[str, Settings | None]] | None = None
    widths: Sequence[int] = ()
    fold_bn: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None) -> Recipe:
        """Read the plain ``quantizer`` part of a configuration.

        Raises:
            ValueError: an unknown key, naming it.
        """
        config = dict(config or {})
        for key in config:
            if key not in RECIPE_KEYS:
                raise ValueError(f"quantizer.{key} is unknown: use one of {', '.join(RECIPE_KEYS)}")
        bits = config.get("bits")  # a layer may be taken out (0 bits) by a rule or a table, not the whole network
        if bits is not None and not _is_width(bits) and bits != FLOAT_BITS:
            raise ValueError(f"quantizer.bits={bits}: {WIDTHS}")
        rules = [_rule(entry, f"quantizer.rules[{index}]") for index, entry in enumerate(_entries(config, "rules"))]
        outputs = [
            _rule({"match": entry["match"], "output": entry["quantizer"]}, f"quantizer.outputs[{index}]", "quantizer")
            for index, entry in enumerate(_entries(config, "outputs"))
            if _exact_keys(entry, {"match", "quantizer"}, f"quantizer.outputs[{index}]")
        ]
        replace = [
            (_pattern(entry["match"], f"quantizer.replace[{index}]"), _target(entry["module"], index))
            for index, entry in enumerate(_entries(config, "replace"))
            if _exact_keys(entry, {"match", "module"}, f"quantizer.replace[{index}]")
        ]
        slots = {slot: _settings(config.get(slot), f"quantizer.{slot}") for slot in SLOT_KEYS}
        widths, fold_bn = config.get("widths") or (), _fold_bn(config.get("fold_bn"))
        if not isinstance(widths, Sequence) or not all(_is_width(width) for width in widths):
            raise ValueError(f"quantizer.widths={widths!r}: use a list of bits such as [2, 4], or []")
        table = config.get("table")
        if table is not None and not isinstance(table, Mapping):
            raise ValueError(f"quantizer.table={table!r}: use the table.yaml or allocation.yaml of a run, or null")
        if widths and fold_bn is not None:
            raise ValueError(f"quantizer.fold_bn={fold_bn}: quantizer.widths needs batch-norms of its own; use none")
        return cls(
            **slots,
            rules=rules,
            outputs=outputs,
            replace=replace,
            table=table,
            widths=widths,
            fold_bn=fold_bn,
        )

    def resolve(self, names: Sequence[str], first: str, last: str) -> Table:
        """The specification of every slot of every layer.

        Raises:
            ValueError: a rule that matches no layer, a table that does not fit the network, or bad settings.
        """
        if self.table is not None:
            return self._from_table(names)
        for index, rule in enumerate(self.rules):
            if not any(rule.matches(name, first, last) for name in names):
                raise ValueError(
                    f"quantizer.rules[{index}].match={rule.match!r} matches no layer: use a regular expression for a "
                    f"whole layer name such as {first!r}, or @first, @last"
                )
        table: Table = {}
        for name in names:
            applicable = [rule for rule in self.rules if rule.matches(name, first, last)]
            table[name] = {}
            for slot in SLOT_KEYS:
                settings = getattr(self, slot)
                for rule in applicable:
                    if slot in rule.settings:
                        change = rule.settings[slot]
                        settings = None if change is None else {**(settings or {}), **change}
                table[name][slot] = make_spec(settings, f"quantizer.{slot}")
        return table

    def _from_table(self, names: Sequence[str]) -> Table:
        assert self.table is not None
        missing = [name for name in names if name not in self.table]
        surplus = [name for name in self.table if name not in names]
        if missing or surplus:
            raise ValueError(
                f"quantizer.table does not fit this model: missing {missing[:3]}, not in the model {surplus[:3]}; "
                "use a table written by a run of the same model"
            )
        return table_from_plain({name: self.table[name] for name in names}, "quantizer.table.")


def make_spec(settings: Settings | None, key: str) -> QuantizerSpec | None:
    """A specification from plain settings; None for no settings or for 32 bits.

    Raises:
        ValueError: unknown field or bad value, naming ``key``.
    """
    if settings is None or settings.get("bits") == FLOAT_BITS:
        return None
    known = [field.name for field in fields(QuantizerSpec)]
    for field in settings:
        if field not in known:
            raise ValueError(f"{key}.{field} is unknown: use one of {', '.join(known)}")
    options = _settings(settings.get("options"), f"{key}.options", "arguments of the quantizer such as {alpha: 6}")
    try:
        return QuantizerSpec(**{**settings, "options": dict(options or {})})
    except ValueError as error:
        raise ValueError(f"{key}.{error}") from None


def table_from_plain(plain: Mapping[str, Any], where: str) -> Table:
    """A resolved table from plain containers.

    Args:
        plain: layer name -> ``weight``, ``input`` and maybe ``output`` -> settings, or null for no quantizer.
        where: what stands before the layer's name in messages, such as ``quantizer.table.``.

    Raises:
        ValueError: other slots, one that is missing, or bad settings, naming the layer.
    """
    for name, slots in plain.items():
        if not isinstance(slots, Mapping) or not {"weight", "input"} <= set(slots) <= set(SLOT_KEYS):
            found = ", ".join(map(str, slots)) if isinstance(slots, Mapping) else repr(slots)
            raise ValueError(f"{where}{name} has {found or 'nothing'}: a layer has weight, input and maybe output")
    return {
        str(name): {slot: make_spec(_settings(slots.get(slot), f"{where}{name}.{slot}"), f"{where}{name}.{slot}")
                    for slot in SLOT_KEYS}
        for name, slots in plain.items()
    }  # fmt: skip


def table_to_plain(table: Table) -> dict[str, dict[str, dict[str, Any] | None]]:
    """A table as plain containers, fit for YAML and for ``quantizer.table``."""
    return {
        name: {slot: None if spec is None else {f.name: getattr(spec, f.name) for f in fields(spec)}
               for slot, spec in slots.items()}
        for name, slots in table.items()
    }  # fmt: skip


def format_table(table: Table) -> str:
    """The table as aligned text, a line a layer: ``name  weight  input  output``, e.g. ``lsq 4``."""
    rows: list[tuple[str, ...]] = [("layer", *SLOT_KEYS)]
    rows += [(name, *(_cell(slots[slot]) for slot in SLOT_KEYS)) for name, slots in table.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _cell(spec: QuantizerSpec | None) -> str:
    if spec is None:
        return "float"
    return f"{spec.name.rpartition('.')[2]} {spec.bits}" + (" per channel" if spec.granularity == "channel" else "")


def _fold_bn(value: Any) -> int | None:
    if value in (None, "none"):
        return None
    if isinstance(value, bool) or value not in (0, 1, 2, 3, 4):
        raise ValueError(f"quantizer.fold_bn={value}: use none, 0, 1, 2, 3 or 4")
    return int(value)


def _entries(config: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    entries = config.get(key) or []
    if not isinstance(entries, Sequence) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ValueError(f"quantizer.{key}={entries!r}: use a list of entries such as {{match: ...}}, or []")
    return entries


def _rule(entry: Mapping[str, Any], key: str, called: str | None = None) -> Rule:
    allowed = {"match", *SLOT_KEYS}
    if "match" not in entry or not set(entry) <= allowed:
        raise ValueError(f"{key}={dict(entry)}: a rule has 'match' and some of {', '.join(SLOT_KEYS)}")
    settings = {slot: _settings(entry[slot], f"{key}.{called or slot}") for slot in SLOT_KEYS if slot in entry}
    for slot, changes in settings.items():
        make_spec(changes, f"{key}.{called or slot}")  # with defaults: what is wrong in itself is the rule's fault
    return Rule(_pattern(entry["match"], key), settings)


def _settings(value: Any, key: str, right: str = "settings such as {name: lsq, bits: 4}") -> Settings | None:
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{key}={value!r}: use null or {right}")
    return value


def _target(value: Any, index: int) -> Settings:
    if not isinstance(value, Mapping) or "_target_" not in value:
        raise ValueError(
            f"quantizer.replace[{index}].module={value!r}: use the class of a module, such as "
            "{_target_: torch.nn.Hardtanh}"
        )
    return value


def _is_width(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_BITS


def _pattern(match: Any, key: str) -> str:
    try:
        re.compile(match)
    except (re.error, TypeError) as error:
        raise ValueError(f"{key}.match={match!r} is no regular expression ({error}): escape or close it") from None
    return str(match)


def _exact_keys(entry: Mapping[str, Any], keys: set[str], key: str) -> bool:
    if set(entry) != keys:
        raise ValueError(f"{key}={dict(entry)}: use exactly the keys {', '.join(sorted(keys))}")
    return True
