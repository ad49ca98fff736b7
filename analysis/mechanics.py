"""The page of mechanics, what each declares and which go together: ``python -m analysis.mechanics [output=FILE]``.

Declarations are read off the classes that conf/callbacks names; that two mechanics go together is tried out, on the
default network of conf/train.yaml.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from analysis.cli import script
from research.config import build_module, plain
from research.learning.composition import check_composition
from research.learning.mechanic import Mechanic
from research.runs.files import atomic_write_text
from research.targets import resolve_target

CARDS = Path("docs/methods")
DECLARED = Path("tests/conformance/declared")
PREFACE = Path("analysis/prefaces/mechanics.md")
COSTS = Path("docs/results/mechanic_cost.json")
HEADER = (
    "mechanic", "stage", "claims", "second derivatives", "compiled", "precisions", "ddp", "quantizers", "off switch",
    "forward passes", "step time", "memory",
)  # fmt: skip
Config = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A mechanic as its file in conf/callbacks sets it.

    Args:
        slug: its name.
        config: its arguments, ``_target_`` included.
        mechanic: the mechanic itself, attached to nothing.
        quantizers: of conf/quantizer, those whose networks it accepts.
    """

    slug: str
    config: Config
    mechanic: Mechanic
    quantizers: tuple[str, ...]


def names(group: str) -> list[str]:
    """The choices of a config group."""
    return sorted(path.stem for path in Path("conf", group).glob("*.yaml"))


def train_configs() -> dict[str, Config]:
    """A plain training config with every mechanic, for every quantizer by name."""
    with initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        config = compose("train", overrides=[f"callbacks=[{','.join(names('callbacks'))}]"])
    configs = {}
    for name in names("quantizer"):
        config.quantizer = OmegaConf.load(f"conf/quantizer/{name}.yaml")
        configs[name] = plain(config)
    return configs


def refusal(base: Config, mechanics: Mapping[str, Config]) -> str | None:
    """Why a network with these mechanics cannot be built, None if it can."""
    try:
        build_module({**base, "callbacks": dict(mechanics)})
    except ValueError as error:
        return str(error)
    return None


def entries(bases: Mapping[str, Config]) -> list[Entry]:
    """All mechanics of conf/callbacks, by slug.

    Args:
        bases: a training config for every quantizer.
    """
    found = []
    for slug, config in sorted(next(iter(bases.values()))["callbacks"].items()):
        mechanic = resolve_target(config, trusted=True, key=f"callbacks.{slug}")
        serving = tuple(name for name, base in bases.items() if refusal(base, {slug: config}) is None)
        found.append(Entry(slug, config, mechanic, serving))
    return found


def verdict(one: Entry, other: Entry, bases: Mapping[str, Config]) -> str:
    """``yes``, the claim that two mechanics both make, or ``no quantizer`` that serves both."""
    try:
        check_composition([one.mechanic, other.mechanic], one.mechanic.precisions[0], compiled=False)
    except ValueError:
        return ", ".join(f"`{claim}`" for claim in sorted(one.mechanic.claims & other.mechanic.claims))
    both = {one.slug: one.config, other.slug: other.config}
    common = [name for name in one.quantizers if name in other.quantizers]
    return "yes" if any(refusal(bases[name], both) is None for name in common) else "no quantizer"


def off_switch(slug: str) -> str:
    """The settings with which a mechanic is plain training, as its conformance file declares them."""
    path = DECLARED / f"{slug}.yaml"
    declared = yaml.load(path.read_text(), Loader=yaml.BaseLoader) if path.is_file() else {}  # all scalars as text
    off = declared.get("off")
    return ", ".join(f"`{key}={value}`" for key, value in off.items()) if isinstance(off, dict) else "–"


def some(chosen: Sequence[str], everything: Sequence[str]) -> str:
    """A choice in the fewest words: ``all``, ``all but ...``, or the names."""
    left_out = [name for name in everything if name not in chosen]
    if len(left_out) < len(chosen):
        return f"all but {', '.join(left_out)}" if left_out else "all"
    return ", ".join(chosen)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def linked(slug: str) -> str:
    """A slug, with a link to its method card where there is one."""
    return f"[{slug}](methods/{slug}.md)" if (CARDS / f"{slug}.md").is_file() else slug


def measured() -> dict[str, Any]:
    """The record that `analysis.mechanic_cost` wrote."""
    record: dict[str, Any] = json.loads(COSTS.read_text())
    return record


def cells(entry: Entry, everything: Sequence[str], costs: Mapping[str, Any]) -> list[str]:
    """The declarations of one mechanic, and what it costs as far as that was measured."""
    mechanic = entry.mechanic
    cost = costs.get(entry.slug)
    return [
        linked(entry.slug),
        mechanic.stage,
        ", ".join(f"`{claim}`" for claim in sorted(mechanic.claims)) or "–",
        "yes" if mechanic.needs_double_backward else "–",
        "no" if mechanic.needs_double_backward else "yes",
        ", ".join(mechanic.precisions),
        mechanic.ddp,
        some(entry.quantizers, everything),
        off_switch(entry.slug),
        str(cost["forwards"]) if cost else "–",
        f"{cost['ratio']:.2f}" if cost else "–",
        f"{cost['memory']:.2f}" if cost else "–",
    ]


def page() -> str:
    """The page, from the files of the repository in the working directory."""
    bases = train_configs()
    found = entries(bases)
    pairs = {frozenset((a.slug, b.slug)): verdict(a, b, bases) for a, b in combinations(found, 2)}
    slugs = [entry.slug for entry in found]
    record = measured()
    matrix = [[f"**{one}**", *(pairs.get(frozenset((one, other)), "·") for other in slugs)] for one in slugs]
    return "\n\n".join(
        [
            "# Mechanics at a glance",
            PREFACE.read_text().strip(),
            table(HEADER, [cells(entry, list(bases), record["mechanics"]) for entry in found]),
            "Step time: processor time of an optimizer step as a multiple of plain training with the same quantizer "
            f"({record['network']}, batches of {record['batch_size']}, eager, {record['threads']} thread, "
            f"{record['hardware']}; median of {len(next(iter(record['mechanics'].values()))['ratios'])} interleaved "
            "rounds, `python -m analysis.mechanic_cost output=docs/results/mechanic_cost.json`). HERO without its "
            "warm-up; what looks at the network once in some epochs, without that. Memory: the most that autograd "
            "graphs keep at a time, as a multiple in the same way. Mechanics that take second derivatives run the "
            "quantizers in their slower form; plain training does not.",
            "## Which go together",
            "*yes*, or the claim that both make, or *no quantizer* where none serves both.",
            table(["", *slugs], matrix),
            "Generated from conf/callbacks and its classes: `python -m analysis.mechanics output=docs/mechanics.md`.\n",
        ]
    )


def main(output: str | None) -> None:
    """Print the page, or write it to a file.

    Args:
        output: Markdown file to write; None prints.
    """
    if output is None:
        print(page(), end="")
    else:
        atomic_write_text(Path(output), page())


if __name__ == "__main__":
    script(main, {"output": None})
