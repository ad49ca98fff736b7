"""The smallest jobs that have everything: hyper-parameters, networks, synthetic images and a Trainer, for tests."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from research.data import ImageDataModule
from research.learning.guard import NonFiniteGuard
from research.learning.module import QuantModule
from research.learning.prepare import Preparation
from research.models.structure import FloatModel, Structure
from research.runs.checkpoint import RunCheckpoint, VerifiedCheckpointIO, load_checkpoint

CLASSES, SIDE = 4, 8
LAST = Path("checkpoints/last.ckpt")
FLOAT: dict[str, Any] = {}
LSQ: dict[str, Any] = {
    "weight": {"name": "lsq", "bits": 4, "signed": True, "init": "lsq"},
    "input": {"name": "lsq", "bits": 4, "signed": "auto", "init": "lsq"},
}
RESNET: dict[str, Any] = {"_target_": "research.models.resnet8", "num_classes": CLASSES, "width": 4}
SGD: dict[str, Any] = {
    "_target_": "torch.optim.SGD",
    "lr": 0.1,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 1e-3,
    "norm": {"weight_decay": 0.0},
    "quantizer": {"lr_factor": 0.1},
}


class TinyNet(FloatModel):
    """conv - [bn] - relu - pool - [dropout] - fc; without batch-norm it trains the same in any number of processes."""

    def __init__(self, batchnorm: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=not batchnorm)
        self.bn1 = nn.BatchNorm2d(4) if batchnorm else nn.Identity()
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.flatten = nn.Flatten(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(16, CLASSES)

    def structure(self) -> Structure:
        pairs = (("conv1", "bn1"),) if isinstance(self.bn1, nn.BatchNorm2d) else ()
        return Structure(blocks=(), conv_bn=pairs, first="conv1", last="fc")

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        y: Tensor = self.fc(self.dropout(self.flatten(x)))
        return y


def tiny_net(batchnorm: bool = True, dropout: float = 0.0) -> dict[str, Any]:
    return {"_target_": "tests.learning.tiny.TinyNet", "batchnorm": batchnorm, "dropout": dropout}


def make_module(mechanics: dict[str, Any] | None = None, seed: int = 0, **changes: Any) -> QuantModule:
    """A configured host; the same arguments give the same weights."""
    pl.seed_everything(seed, verbose=False)
    settings: dict[str, Any] = {
        "model": tiny_net(),
        "task": {"_target_": "research.learning.tasks.Classification", "num_classes": CLASSES},
        "quantizer": LSQ,
        "optimizer": SGD,
        "scheduler": {"name": "cosine"},
        "mechanics": mechanics or {},
        "seed": seed,
        "trusted": True,
    }
    module = QuantModule(**{**settings, **changes})
    module.configure_model()
    return module


def make_data(**changes: Any) -> ImageDataModule:
    """Synthetic images: 4 batches of 8 an epoch."""
    settings: dict[str, Any] = {
        "batch_size": 8,
        "eval_batch_size": 16,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "num_classes": CLASSES,
        "in_channels": 3,
        "image_size": SIDE,
        "validation": 8,
        "padding": 1,
        "flip": True,
        "options": {"train": 40, "test": 16},
    }
    return ImageDataModule("synthetic", "", **{**settings, **changes})


def float_weights(path: Path, model: dict[str, Any], seed: int = 7) -> Path:
    """A file of float weights of ``model`` that differ from every fresh initialisation."""
    module = make_module(seed=seed, model=model, quantizer=FLOAT)
    state = {name: tensor.contiguous() for name, tensor in module.net.state_dict().items()}
    save_file(state, path)
    return path


class StopAt(pl.Callback):
    """Ends the fit by an exception in front of a batch, as a crash would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *arguments: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("stopped")


def fit(
    module: QuantModule,
    data: Any = None,
    folder: Path | None = None,
    resume: Path | None = None,
    callbacks: tuple[pl.Callback, ...] = (),
    **options: Any,
) -> pl.Trainer:
    """Fit as ``research.train`` does, on the CPU, without loggers; with a folder, checkpoints every two steps in it."""
    saving = [] if folder is None else [RunCheckpoint(folder / LAST.parent, every_n_steps=2)]
    settings: dict[str, Any] = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1}
    trainer = pl.Trainer(
        **{**settings, **options},
        callbacks=[Preparation(batches=1, batch_size=16), NonFiniteGuard(), *callbacks, *saving],
        plugins=[VerifiedCheckpointIO()],
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=bool(saving),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=make_data() if data is None else data, ckpt_path=resume)
    return trainer


def state(module: nn.Module) -> dict[str, Tensor]:
    """Copies of parameters and buffers by name, metrics aside."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items() if "metrics" not in name}


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nested containers of tensors and plain values differ; bit for bit, NaN equals NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
        return [] if same else [where]
    if isinstance(one, dict) and isinstance(other, dict):
        names = {**one, **other}
        missing = [f"{where}/{name}" for name in names if (name in one) != (name in other)]
        both = [name for name in names if name in one and name in other]
        return missing + [fault for name in both for fault in differences(one[name], other[name], f"{where}/{name}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [where]
        pairs = enumerate(zip(one, other, strict=True))
        return [fault for index, (a, b) in pairs for fault in differences(a, b, f"{where}/{index}")]
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other):
        return []
    return [] if one == other else [where]


def resume_differences(folder: Path, **settings: Any) -> list[str]:
    """Train uninterrupted, and with a crash in the first epoch and a resume: where the two last checkpoints differ.

    The checkpoints hold the weights, the optimizer, the schedule, the loops, all mechanics and the random generators.
    """
    fit(make_module(**settings), folder=folder / "whole")
    try:
        fit(make_module(**settings), folder=folder / "parts", callbacks=(StopAt(3),))
    except RuntimeError:
        pl.seed_everything(99, verbose=False)
        fit(make_module(**settings), folder=folder / "parts", resume=folder / "parts" / LAST)
    whole, parts = (load_checkpoint(folder / name / LAST) for name in ("whole", "parts"))
    assert whole["global_step"] == 8
    return differences(whole, parts)
