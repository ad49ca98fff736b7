"""The keys of ``conf/train.yaml``: what a training config may hold, checked before anything is read or written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import nn

from research.arguments import check_arguments
from research.learning.optim import Schedule
from research.learning.prepare import Preparation
from research.quant.recipe import SLOT_KEYS
from research.runs.checkpoint import RunCheckpoint
from research.targets import find_target, resolve_target

TRAINER_OWN = ("callbacks", "logger", "plugins", "default_root_dir", "enable_model_summary", "num_sanity_val_steps")
"""Arguments of the Trainer that no config sets."""

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed"}
"""Lightning's names of the precisions."""

BETTER = {"val/loss": "min", "val/accuracy": "max"}
"""The ``checkpoint.mode`` that keeps the best epoch, of the metrics that every classification logs."""

REPLACED_BY_TABLE = re.compile(rf"[+~]*quantizer\.({'|'.join((*SLOT_KEYS, 'rules', 'bits'))})\b")
"""An override of what a recipe's table stands in place of."""

Section = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """The top level."""

    name: str
    seed: int
    init_from: str | None
    compile: str
    recompute: bool
    channels_last: bool
    calibration: Section
    checkpoint: Section
    finalise: Section
    deploy: Section
    paths: Section
    data: Section
    model: Section
    quantizer: Section
    task: Section
    optimizer: Section
    scheduler: Section
    callbacks: Section
    trainer: Section
    logger: Section


@dataclass(frozen=True)
class Finalise:
    """``finalise``."""

    weights: Literal["last", "best"]
    batchnorm_batches: int


@dataclass(frozen=True)
class Deploy:
    """``deploy``."""

    onnx: bool


@dataclass(frozen=True)
class Paths:
    """``paths``."""

    runs: str
    data: str
    checkpoints: str


@dataclass(frozen=True)
class Loggers:
    """``logger``."""

    wandb: Section


@dataclass(frozen=True)
class Wandb:
    """``logger.wandb``."""

    mode: str
    project: str
    dir: str | None


def check_training(config: Mapping[str, Any]) -> None:
    """Check a plain training config, but for what the model, the data and the mechanics check as they are built.

    Raises:
        ValueError: an unknown key, a value of another type, or keys that contradict each other.
    """
    check_arguments(Training, config, key="", name="training")
    if not 0 <= config["seed"] < 2**32:
        raise ValueError(f"seed={config['seed']}: use an integer from 0 to {2**32 - 1}")
    sections = {
        "finalise": Finalise,
        "deploy": Deploy,
        "paths": Paths,
        "logger": Loggers,
        "calibration": Preparation,
    }
    for key, section in sections.items():
        check_arguments(section, config[key], key=key, name=key)
    check_arguments(Wandb, config["logger"]["wandb"], key="logger.wandb", name="logger.wandb")
    check_arguments(RunCheckpoint, config["checkpoint"], "", key="checkpoint", name="checkpoint")
    Preparation(**config["calibration"])
    RunCheckpoint(Path(), **config["checkpoint"])
    check_arguments(Schedule, {**config["scheduler"], "total": 0}, key="scheduler", name="scheduler")
    Schedule(**config["scheduler"], total=0).require_used(config["scheduler"])
    for slug, settings in config["callbacks"].items():
        if not isinstance(settings, dict):
            raise ValueError(f"callbacks.{slug}={settings!r}: use the settings of a mechanic, with its _target_")
    _check_trainer(config["trainer"])
    _check_optimizer(config["optimizer"])
    _check_monitor(config)


def _check_monitor(config: Mapping[str, Any]) -> None:
    """What ``checkpoint.monitor`` and ``finalise.weights=best`` need."""
    monitor, mode, trainer = config["checkpoint"].get("monitor"), config["checkpoint"].get("mode"), config["trainer"]
    best = config["finalise"]["weights"] == "best"
    if best and monitor is None:
        raise ValueError("finalise.weights=best needs checkpoint.monitor; add checkpoint.monitor=val/accuracy")
    if monitor is not None and not config["data"].get("validation"):
        raise ValueError(f"checkpoint.monitor={monitor}: data.validation=0 holds nothing out; use data.validation=1000")
    if BETTER.get(monitor, mode) != mode:
        raise ValueError(
            f"checkpoint.mode={mode} would keep the worst {monitor}; use checkpoint.mode={BETTER[monitor]}"
        )
    if best and trainer.get("limit_val_batches") == 0:
        raise ValueError("finalise.weights=best: trainer.limit_val_batches=0 validates nothing; leave it out")
    every, epochs = trainer.get("check_val_every_n_epoch"), trainer.get("max_epochs")
    if best and every and epochs is not None and 0 <= epochs < every:
        advice = f"use 1 to {epochs}" if epochs else "use finalise.weights=last"
        raise ValueError(
            f"finalise.weights=best: with trainer.check_val_every_n_epoch={every} nothing is validated in "
            f"{epochs} epochs; {advice}"
        )


def unused_beside_table(config: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """The overrides of a plain config's recipe that say nothing, since its ``quantizer.table`` says it all."""
    if config["quantizer"].get("table") is None:
        return []
    return [override for override in overrides if REPLACED_BY_TABLE.match(override)]


def _check_trainer(trainer: Mapping[str, Any]) -> None:
    for name in TRAINER_OWN:
        if name in trainer:
            raise ValueError(f"trainer.{name} cannot be set: training sets it itself; leave it out")
    given = {name: value for name, value in trainer.items() if name != "precision"}
    if str(trainer.get("precision")) not in PRECISIONS:
        raise ValueError(f"trainer.precision={trainer.get('precision')}: use {' or '.join(PRECISIONS)}")
    check_arguments(pl.Trainer, given, key="trainer", name="trainer")
    for name in ("accumulate_grad_batches", "check_val_every_n_epoch", "log_every_n_steps"):
        value = trainer.get(name)
        if isinstance(value, int) and value < 1:
            raise ValueError(f"trainer.{name}={value}: use 1 or more")
    if trainer.get("val_check_interval") == 0:
        raise ValueError("trainer.val_check_interval=0: use a part of an epoch such as 0.5, or a number of batches")
    if (trainer.get("gradient_clip_val") or 0) < 0:
        raise ValueError(f"trainer.gradient_clip_val={trainer['gradient_clip_val']}: use 0 or more, or null for none")


def _check_optimizer(optimizer: Mapping[str, Any]) -> None:
    options = {name: value for name, value in optimizer.items() if name not in ("_target_", "norm", "quantizer")}
    target = find_target(optimizer.get("_target_", ""), trusted=True, key="optimizer")
    check_arguments(target, options, [], key="optimizer", name=optimizer["_target_"])
    resolve_target(
        {**options, "_target_": optimizer["_target_"]}, [nn.Parameter(torch.zeros(1))], trusted=True, key="optimizer"
    )
    for group in ("norm", "quantizer"):
        if not isinstance(optimizer.get(group) or {}, Mapping):
            raise ValueError(f"optimizer.{group}={optimizer[group]!r}: use a mapping such as {{weight_decay: 0}}")
        changes = dict(optimizer.get(group) or {})
        factor = changes.pop("lr_factor", 1.0)
        if isinstance(factor, bool) or not isinstance(factor, int | float) or factor < 0:
            raise ValueError(f"optimizer.{group}.lr_factor={factor!r}: use a number, 0 or more")
        if "lr" in changes and "lr_factor" in (optimizer.get(group) or {}):
            raise ValueError(
                f"optimizer.{group}: lr and lr_factor contradict each other; add ~optimizer.{group}.lr_factor"
            )
        check_arguments(target, changes, [], key=f"optimizer.{group}", name=optimizer["_target_"])
