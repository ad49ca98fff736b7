"""From a composed Hydra config to plain containers, to data and host, and to files on this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from research.data import ImageDataModule
from research.learning.module import QuantModule
from research.runs.records import read_config
from research.targets import resolve_target

FINAL = "final.safetensors"


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved config as plain containers, with an empty ``callbacks`` where none was chosen.

    ``quantizer.table`` given as a file name is replaced by what the file holds, so that the config alone says
    everything.

    Raises:
        ValueError: a missing or malformed table.
    """
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    values = {str(key): value for key, value in resolved.items()}
    values["callbacks"] = dict(values.get("callbacks") or {})
    if isinstance(values.get("trainer"), dict) and "precision" in values["trainer"]:
        values["trainer"]["precision"] = str(values["trainer"]["precision"])  # 32 and "32" are one configuration
    table = (values.get("quantizer") or {}).get("table")
    if isinstance(table, str):
        if not Path(table).is_file():
            raise ValueError(f"quantizer.table={table}: no such file; use the table.yaml or allocation.yaml of a run")
        values["quantizer"]["table"] = read_config(Path(table))
    return values


def recorded(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a plain config that a run folder keeps: everything but the places on this machine."""
    return {key: value for key, value in config.items() if key != "paths"}


def build_data(config: dict[str, Any], trusted: bool = True) -> ImageDataModule:
    """The data module of a plain config; files are looked for below ``paths.data``.

    Raises:
        ValueError: a ``_target_`` that is unknown or, for a config of a run folder (not ``trusted``), refused.
    """
    settings = {**config["data"], "root": config["paths"]["data"]}
    data = resolve_target(settings, trusted=trusted, key="data")
    if not isinstance(data, ImageDataModule):
        raise ValueError(f"data._target_={config['data']['_target_']}: use research.data.ImageDataModule")
    return data


def build_module(config: dict[str, Any], trusted: bool = True) -> QuantModule:
    """The host module of a plain config, with its network built and its mechanics attached."""
    module = QuantModule(
        model=config["model"],
        task=config["task"],
        quantizer=config["quantizer"],
        optimizer=config["optimizer"],
        scheduler=config["scheduler"],
        mechanics=config["callbacks"],
        precision=str(config["trainer"]["precision"]),
        compile=config["compile"],
        recompute=config["recompute"],
        channels_last=config["channels_last"],
        seed=config["seed"],
        checkpoint=initial_checkpoint(config),
        trusted=trusted,
    )
    module.configure_model()
    return module


def initial_checkpoint(config: Mapping[str, Any]) -> Path | None:
    """The float weights that ``init_from`` of a plain config names: a file, a run folder, or an experiment's folder.

    It is looked for as given, below ``paths.checkpoints`` and below ``paths.runs``. Of an experiment's finished runs it
    is the only one, or the only one of the config's own ``seed``: each seed of a sweep has a float network of its own.

    Raises:
        ValueError: nothing there (says where it was looked for), or several runs.
    """
    init_from: str | None = config["init_from"]
    paths: Mapping[str, str] = config["paths"]
    if init_from is None:
        return None
    seed = config["seed"]
    candidates = [Path(init_from), Path(paths["checkpoints"]) / init_from, Path(paths["runs"]) / init_from]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
        finals = [candidate / FINAL] if (candidate / FINAL).is_file() else sorted(candidate.glob(f"*/{FINAL}"))
        if len(finals) > 1:
            runs = ", ".join(f"{init_from}/{final.parent.name}" for final in finals)
            finals = [final for final in finals if _seed_of(final.parent) == seed]
            if len(finals) != 1:
                raise ValueError(
                    f"init_from={init_from} has several finished runs, {len(finals) or 'none'} with seed={seed}: "
                    f"name one of {runs}"
                )
        if finals:
            return finals[0]
    places = ", ".join(str(candidate) for candidate in candidates)
    raise ValueError(
        f"init_from={init_from}: no .safetensors file and no finished run at {places}; "
        "give a file, a run folder, or paths.checkpoints (FLATBIT_CHECKPOINTS)"
    )


def _seed_of(folder: Path) -> Any:
    config = folder / "config.yaml"
    return read_config(config).get("seed") if config.is_file() else None


def initial_digest(config: dict[str, Any]) -> str | None:
    """SHA-256 of the file that ``init_from`` of a plain config names; None for random weights.

    Raises:
        ValueError: see `initial_checkpoint`.
    """
    checkpoint = initial_checkpoint(config)
    return None if checkpoint is None else hashlib.sha256(checkpoint.read_bytes()).hexdigest()
