"""Sealing a run: finalise, test once, deploy, and write the summary last."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from research.data import ImageDataModule
from research.deploy import export_onnx, parity_report, save_artifact
from research.learning.finalise import SINGLE, finalise, measure
from research.learning.module import QuantModule
from research.quant.cost_report import cost_report
from research.runs.checkpoint import load_checkpoint
from research.runs.files import atomic_write_bytes
from research.runs.folder import RunFolder
from research.runs.records import write_summary

log = logging.getLogger(__name__)
WEIGHTS = ("last", "best")


def seal(
    config: Mapping[str, Any],
    folder: RunFolder,
    module: QuantModule,
    data: ImageDataModule,
    trainer: pl.Trainer,
    seconds: float,
) -> None:
    """Finalise the trained module, test it and its deployed form, and write ``summary.json``.

    Args:
        config: plain config of the run.
        folder: the run folder.
        module: the trained host.
        data: its data module; the test set is used here, once.
        trainer: the Trainer that trained it.
        seconds: wall-clock seconds of the training.
    """
    if config["finalise"]["weights"] == "best":
        module.load_state_dict(load_checkpoint(folder.checkpoints / "best.ckpt")["state_dict"])
    module.cpu()
    count = config["finalise"]["batchnorm_batches"]
    batches = [images.cpu() for images, _ in data.calibration_batches(count, data.batch_size)] if count else []
    deployments = finalise(module, batches)
    structure = module.net.structure()
    float_accuracy = None
    if module.checkpoint is not None:
        float_accuracy = measure(module.initial_network(), module.task, test_batches(data))["accuracy"]
    rows = []
    for name, net in deployments.items():
        place = folder.artifact if name == SINGLE else folder.artifact / name
        row = {"name": name, "float_accuracy": float_accuracy, **measure(net, module.task, test_batches(data))}
        row |= cost_report(net, (data.in_channels, data.image_size, data.image_size), structure.first, structure.last)
        row |= deploy(net, config, place, data, {"run": f"{folder.experiment}/{folder.hash}"}, config["deploy"]["onnx"])
        rows.append(row)
        save_weights(net, folder.final if name == SINGLE else folder.path / f"final-{name}.safetensors")
        log.info("%s: %s", name, ", ".join(f"{key} {value}" for key, value in row.items() if key in SHOWN))
    extra = {
        "model": config["model"]["_target_"].rpartition(".")[2],
        "data": config["data"]["name"],
        "bits": config["quantizer"].get("bits"),
        "mechanics": sorted(config["callbacks"]),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "seconds": round(seconds, 1),
        "device": str(trainer.strategy.root_device.type),
    }
    write_summary(folder, config["seed"], rows, extra)


SHOWN = ("accuracy", "float_accuracy", "deployed_accuracy", "argmax_agreement", "size_kib", "gbops")


def test_batches(data: ImageDataModule) -> list[Any]:
    """The whole test set as batches on the CPU, where deployed networks are measured."""
    return [(images.cpu(), labels.cpu()) for images, labels in data.test_dataloader()]


def deploy(
    net: nn.Module,
    config: Mapping[str, Any],
    place: Path,
    data: ImageDataModule,
    meta: Mapping[str, Any],
    onnx: bool,
) -> dict[str, Any]:
    """Write the integer artifact and, with ``onnx``, run the ONNX form over the test set; what was measured."""
    report = save_artifact(net, config["model"], place, config["quantizer"].get("replace") or (), meta)
    row: dict[str, Any] = {"artifact_bytes": report.bytes, "artifact_compression": report.compression}
    if onnx:
        example = torch.zeros(1, data.in_channels, data.image_size, data.image_size)
        export_onnx(net, example, place / "model.onnx")
        row |= parity_report(net, place / "model.onnx", test_batches(data))
    return row


def save_weights(net: nn.Module, path: Path) -> None:
    """Write the state of ``net`` as safetensors, atomically."""
    from safetensors.torch import save

    state = {name: tensor.detach().contiguous() for name, tensor in net.state_dict().items()}
    atomic_write_bytes(path, save(state))
