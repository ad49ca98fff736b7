"""Train one configuration: ``python -m research.train [overrides]``; its run folder keeps everything."""

from __future__ import annotations

import json
import logging
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from research.cli import command
from research.config import build_data, build_module, initial_digest, plain, recorded
from research.data import ImageDataModule
from research.deploy.qdq import require_forms
from research.learning.epoch_line import EpochLine
from research.learning.finalise import finalise
from research.learning.guard import NonFiniteGuard
from research.learning.hooks import NoProfiler, skip_empty_hooks
from research.learning.module import QuantModule
from research.learning.optim import build_optimizer
from research.learning.prepare import Preparation
from research.results import seal
from research.runs.allocation import write_table
from research.runs.checkpoint import RunCheckpoint, VerifiedCheckpointIO, load_checkpoint, load_newest
from research.runs.environment import cpu_convolves_bf16, snapshot
from research.runs.folder import RunFolder
from research.runs.logger import RunLogger, finish_wandb, wandb_logger
from research.runs.memory import keep_freed_memory
from research.runs.preemption import StopOnSignal, requeued_when_stopped
from research.runs.records import read_summary, write_config, write_json
from research.settings import PRECISIONS, check_training, unused_beside_table

log = logging.getLogger(__name__)

INITIAL_WEIGHTS = "initial_weights"
"""Key of ``environment.json``: SHA-256 of the file of float weights that the run started from."""


def build(config: dict[str, Any]) -> tuple[ImageDataModule, QuantModule]:
    """Data and host of a plain config; what is wrong with it shows here, before anything is written."""
    torch.compiler.reset()  # the jobs of a multirun share this process: no job counts another's graphs
    # a debugging aid of deterministic mode that costs a pass over every new tensor
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    keep_freed_memory()
    pl.seed_everything(config["seed"], verbose=False)
    data, module = build_data(config), build_module(config)
    if module.checkpoint is not None:
        module.initial_network()  # its weights fit
    for key in ("num_classes", "in_channels"):
        if (stated := config["model"].get(key, there := getattr(data, key))) != there:
            raise ValueError(f"model.{key}={stated}: the data has {there}; leave it out or use that")
    data.setup()
    if config["deploy"]["onnx"]:
        for net in finalise(module).values():
            require_forms(net)
    calibration = config["calibration"]
    data.check_calibration("calibration.batches", calibration["batches"], calibration["batch_size"])
    if count := config["finalise"]["batchnorm_batches"]:
        data.check_calibration("finalise.batchnorm_batches", count, data.batch_size)
    build_optimizer(module.net, config["optimizer"], module.active, module)  # mechanics may want one parameter twice
    _require_validation(config, len(data.train_dataloader()))
    return data, module


def _require_validation(config: dict[str, Any], batches: int) -> None:
    """Raise ValueError where ``finalise.weights=best`` cannot be had in ``trainer.max_steps``.

    Args:
        config: the plain config.
        batches: of an epoch.
    """
    trainer = config["trainer"]
    if config["finalise"]["weights"] != "best" or {"val_check_interval", "limit_train_batches"} & set(trainer):
        return
    epoch = math.ceil(batches / (trainer.get("accumulate_grad_batches") or 1))
    steps, first = trainer.get("max_steps", -1), epoch * (trainer.get("check_val_every_n_epoch") or 1)
    if 0 <= steps < first:
        raise ValueError(
            f"finalise.weights=best: trainer.max_steps={steps} ends before the first validation, after {first} steps; "
            "use finalise.weights=last"
        )


def build_trainer(config: dict[str, Any], folder: RunFolder, loggers: list[Any]) -> pl.Trainer:
    """The Trainer of a plain config."""
    settings = dict(config["trainer"])
    precision = str(settings.pop("precision"))
    settings["profiler"] = settings.get("profiler") or NoProfiler()
    settings["enable_progress_bar"] = settings.get("enable_progress_bar", True) and sys.stdout.isatty()
    checkpoint = RunCheckpoint(folder.checkpoints, **config["checkpoint"])
    callbacks: list[Callback] = [
        Preparation(**config["calibration"]),
        NonFiniteGuard(),
        StopOnSignal(checkpoint),
        checkpoint,
    ]
    if not settings["enable_progress_bar"]:
        callbacks.append(EpochLine())
    try:
        callbacks.append(Timer(settings.pop("max_time", None)))  # counts the seconds of all starts of the run
        trainer = pl.Trainer(
            **settings,
            precision=PRECISIONS[precision],  # type: ignore[arg-type]
            callbacks=callbacks,
            logger=loggers,
            plugins=[VerifiedCheckpointIO()],
            default_root_dir=folder.path,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ValueError(f"trainer: {error}") from error
    skip_empty_hooks(callbacks)
    if precision == "bf16" and isinstance(trainer.accelerator, CPUAccelerator) and not cpu_convolves_bf16():
        log.warning("this CPU has no bf16 instructions: training is many times faster with trainer.precision=32")
    return trainer


def other_weights(config: dict[str, Any], folder: RunFolder) -> bool:
    """Whether ``init_from`` names a file that holds other weights by now than those which the run started from."""
    if not folder.environment_path.exists():
        return False
    started_from = json.loads(folder.environment_path.read_text()).get(INITIAL_WEIGHTS)
    try:
        return started_from not in (None, initial_digest(config))
    except ValueError:  # the file has gone: nothing to compare with
        return False


def write_records(config: dict[str, Any], folder: RunFolder, overrides: list[str], module: QuantModule) -> None:
    """Say what is being trained, on the screen and in the run folder."""
    log.info("run folder %s\n%s", folder.path, module.describe())
    write_config(folder.config_path, recorded(config))
    write_config(folder.overrides_path, overrides)
    write_table(folder.table_path, module.table)
    write_json(folder.environment_path, {**snapshot(), INITIAL_WEIGHTS: initial_digest(config)})


def run(config: dict[str, Any], folder: RunFolder, data: ImageDataModule, module: QuantModule) -> None:
    """Train, or go on where an interrupted run of this configuration stopped, then seal the run folder."""
    resume = load_newest(folder.checkpoints)
    record = RunLogger(folder)
    settings = config["logger"]["wandb"]
    wandb = wandb_logger(folder, recorded(config), settings["mode"], settings["project"], settings["dir"])
    step = 0 if resume is None else load_checkpoint(resume)["global_step"]
    record.truncate_after(step - 1)  # what a killed run logged behind its last checkpoint
    if resume is not None:
        log.info("resuming from %s (step %d)", resume.name, step)
    trainer = build_trainer(config, folder, [record] if wandb is None else [record, wandb])
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # the rest is the first rank's alone ...
        data.trainer = None  # ... which tests the whole test set, on the CPU
        if trainer.is_global_zero:
            seal(config, folder, module, data, trainer)
    except SystemExit:  # Lightning's answer to Ctrl-C, or a signal
        log.info("interrupted: the same command goes on from the last checkpoint")
        raise
    finally:
        finish_wandb(wandb, folder)


@command("train")
def main(cfg: DictConfig) -> float | None:
    """Entry point; returns the first deployment's test accuracy, for searches (None on all ranks but the first)."""
    from hydra.core.hydra_config import HydraConfig

    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)  # tips and device lists
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own use of a deprecated torch function
    config = plain(cfg)
    check_training(config)
    overrides = list(HydraConfig.get().overrides.task)
    if unused := unused_beside_table(config, overrides):
        log.warning("quantizer.table stands in place of %s, which changes nothing; leave it out", ", ".join(unused))
    folder = RunFolder.of(Path(config["paths"]["runs"]), config["name"], config)
    if folder.finished:
        log.info("already done: %s", folder.path)
        if other_weights(config, folder):
            log.warning(
                "init_from=%s: it started from other weights than are there now; use another name=", config["init_from"]
            )
    else:
        data, module = build(config)
        if getattr(rank_zero_only, "rank", 0) != 0:  # the first rank holds the folder
            with requeued_when_stopped():
                run(config, folder, data, module)
            return None
        with requeued_when_stopped(), folder.lock():
            if any(folder.checkpoints.glob("*.ckpt")) and other_weights(config, folder):
                raise ValueError(
                    f"init_from={config['init_from']}: the interrupted run {folder.path} started from other weights "
                    "than are there now; use another name="
                )
            write_records(config, folder, overrides, module)
            run(config, folder, data, module)
    return float(read_summary(folder.summary_path)["deployments"][0]["accuracy"])


if __name__ == "__main__":
    main()
