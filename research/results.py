"""Sealing a run: finalise, test once, deploy, and write the summary last."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Timer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from research.config import build_data, build_module, initial_checkpoint
from research.data import ImageDataModule
from research.deploy import export_onnx, parity_report, save_artifact
from research.deploy.biases import round_biases
from research.learning.finalise import SINGLE, finalise, measure
from research.learning.module import QuantModule
from research.models.checkpoint import first_difference
from research.quant.convert import convert
from research.quant.cost_report import cost_report
from research.quant.recipe import Recipe
from research.runs.checkpoint import BEST, load_checkpoint
from research.runs.environment import snapshot
from research.runs.files import atomic_write_bytes
from research.runs.folder import RunFolder
from research.runs.records import read_config, read_summary, write_summary

log = logging.getLogger(__name__)


def seal(
    config: Mapping[str, Any],
    folder: RunFolder,
    module: QuantModule,
    data: ImageDataModule,
    trainer: pl.Trainer,
) -> None:
    """Finalise the trained module, test it and its deployed form, and write ``summary.json``.

    Args:
        config: plain config of the run.
        folder: the run folder.
        module: the trained host.
        data: its data module; the test set is used here, once.
        trainer: the Trainer that trained it, with a ``Timer``.
    """
    if config["finalise"]["weights"] == "best":
        if not (folder.checkpoints / BEST).is_file():
            raise ValueError(
                "finalise.weights=best: the run ended before its first validation; train with finalise.weights=last, "
                "or validate earlier (trainer.check_val_every_n_epoch, +trainer.val_check_interval)"
            )
        module.load_state_dict(load_checkpoint(folder.checkpoints / BEST)["state_dict"])
    module.cpu()
    batches = statistics_batches(data, config["finalise"]["batchnorm_batches"])
    deployments, as_trained = finalise(module, batches), finalise(module) if batches else {}
    structure = module.net.structure()
    tests = test_batches(data)
    float_accuracy = None
    if module.checkpoint is not None:
        float_accuracy = measure(module.initial_network(), module.task, tests)["accuracy"]
    rows = []
    for name, net in deployments.items():
        if config["deploy"]["onnx"]:
            round_biases(net, torch.zeros(1, data.in_channels, data.image_size, data.image_size))
        place = artifact_place(folder, name)
        row = {"name": name, "float_accuracy": float_accuracy, **measure(net, module.task, tests)}
        if name in as_trained:
            row["accuracy_before_batchnorm"] = measure(as_trained[name], module.task, tests)["accuracy"]
        row |= cost_report(net, (data.in_channels, data.image_size, data.image_size), structure.first, structure.last)
        meta = {"run": f"{folder.experiment}/{folder.hash}", "accuracy": row["accuracy"]}
        row |= deploy(net, config, place, data, tests, meta, config["deploy"]["onnx"])
        rows.append(row)
        save_weights(net, weights_place(folder, name))
        shown = [f"{key} {row[key]:.4g}" for key in SHOWN if row.get(key) is not None]
        log.info("%s: %s", name, ", ".join(shown))
    (timer,) = (callback for callback in trainer.callbacks if isinstance(callback, Timer))  # type: ignore[attr-defined]
    extra = {
        "model": config["model"]["_target_"].rpartition(".")[2],
        "data": config["data"]["name"],
        "bits": config["quantizer"].get("bits"),
        "mechanics": sorted(config["callbacks"]),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "seconds": round(timer.time_elapsed(), 1),
        "hardware": hardware(snapshot(), trainer.strategy.root_device.type),
    }
    write_summary(folder, config["seed"], rows, extra)


SHOWN = (
    "accuracy", "accuracy_before_batchnorm", "float_accuracy", "deployed_accuracy", "argmax_agreement", "size_kib",
    "compression",
)  # fmt: skip


def hardware(environment: Mapping[str, Any], device: str) -> str:
    """What a run computed on, in words: the GPU's name, or the CPU's, its number of cores and its instructions."""
    if device == "cuda":
        return str(environment["gpus"][0])
    return f"{environment['cpu']}, {environment['cores']} cores, {environment['cpu_instructions']}"


def recorded_data(folder: RunFolder, paths: Mapping[str, str]) -> ImageDataModule:
    """The data of a recorded run, where ``paths`` says; its config may name nothing outside the allow-list."""
    return build_data({**read_config(folder.config_path), "paths": dict(paths)}, trusted=False)


def statistics_batches(data: ImageDataModule, count: int) -> list[Tensor]:
    """Inputs for batch-norm re-estimation: the first ``count`` training batches of an epoch, augmented as in training.

    Statistics of images without augmentation are those of another distribution (``docs/decisions.md``, 9).
    """
    return [images for images, _ in islice(data.train_dataloader(), count)] if count else []


def test_batches(data: ImageDataModule) -> list[Any]:
    """The whole test set as batches on the CPU, where deployed networks are measured."""
    return list(data.test_dataloader())


def deploy(
    net: nn.Module,
    config: Mapping[str, Any],
    place: Path,
    data: ImageDataModule,
    batches: Sequence[Any],
    meta: Mapping[str, Any],
    onnx: bool,
) -> dict[str, Any]:
    """Write the integer artifact and, with ``onnx``, run the ONNX form over ``batches``; what was measured."""
    report = save_artifact(net, config["model"], place, config["quantizer"].get("replace") or (), meta)
    row: dict[str, Any] = {"artifact_bytes": report.bytes, "artifact_compression": report.compression}
    if onnx:
        example = torch.zeros(1, data.in_channels, data.image_size, data.image_size)
        export_onnx(net, example, place / "model.onnx")
        parity = parity_report(net, place / "model.onnx", batches)
        row |= {"deployed_accuracy": parity["top1_onnx"], "argmax_agreement": parity["argmax_agreement"]}
        row["parity"] = parity
    return row


def artifact_places(folder: RunFolder) -> dict[str, Path]:
    """Folder of each deployment's artifact by deployment name; ``artifact/`` itself where there is only one.

    Raises:
        ValueError: the run is not finished.
    """
    if not folder.finished:
        raise ValueError(f"run={folder.path}: not finished (no valid summary.json); start the same training again")
    names = [row["name"] for row in read_summary(folder.summary_path)["deployments"]]
    return {name: artifact_place(folder, name) for name in names}


def artifact_place(folder: RunFolder, name: str) -> Path:
    """Folder of the artifact of deployment ``name``."""
    return folder.artifact if name == SINGLE else folder.artifact / name


def weights_place(folder: RunFolder, name: str) -> Path:
    """File with the weights of deployment ``name``: latent ones and quantizers, as finalised."""
    return folder.final if name == SINGLE else folder.path / f"final-{name}.safetensors"


def finished_network(folder: RunFolder, name: str = SINGLE) -> nn.Module:
    """The finalised network of a finished run with its latent weights and quantizers; eager, float32, evaluation mode.

    Its structure comes from the run's config, which may name nothing outside the allow-list, its numbers from the
    weights beside it alone.

    Raises:
        ValueError: not finished, no such deployment, or weights that are missing, damaged or of another network.
    """
    if not folder.finished:
        raise ValueError(f"run={folder.path}: not finished (no valid summary.json); start the same training again")
    deployments = finalise(_recorded_module(folder))
    if name not in deployments:
        raise ValueError(f"deployment={name}: the run has {', '.join(deployments)}; use one of them")
    net, path = deployments[name], weights_place(folder, name)
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"run={folder.path}: {path.name} is missing or damaged ({error}); train again") from error
    if difference := first_difference(net.state_dict(), found):
        raise ValueError(f"run={folder.path}: config.yaml and {path.name} disagree: {difference}; train again")
    net.load_state_dict(found)
    return net


def starting_network(folder: RunFolder, paths: Mapping[str, str]) -> tuple[nn.Module, Path]:
    """The float network that a recorded run started from, converted without quantizers, and the file of its weights.

    Args:
        folder: the run folder.
        paths: ``checkpoints`` and ``runs``, where ``init_from`` is looked for.

    Raises:
        ValueError: the run started from random weights, or the file is not found or of another network.
    """
    config = read_config(folder.config_path)
    checkpoint = initial_checkpoint({**config, "paths": paths})
    if checkpoint is None:
        raise ValueError(f"run={folder.path}: init_from=null, the run started from random weights; use initial=false")
    module = _recorded_module(folder)
    module.checkpoint = checkpoint
    net = module.initial_network()
    structure = net.structure()
    convert(net, Recipe.from_config(None), structure.first, structure.last)
    return net.eval(), checkpoint


def _recorded_module(folder: RunFolder) -> QuantModule:
    """The eager host of a recorded run, with random weights."""
    here: dict[str, Any] = {"init_from": None, "compile": "none", "recompute": False, "paths": {}}
    with torch.random.fork_rng(devices=[]):  # the random initialisation that the weights replace is nobody's noise
        return build_module({**read_config(folder.config_path), **here}, trusted=False)


def save_weights(net: nn.Module, path: Path) -> None:
    """Write the state of ``net`` as safetensors, atomically."""
    from safetensors.torch import save

    state = {name: tensor.detach().contiguous() for name, tensor in net.state_dict().items()}
    atomic_write_bytes(path, save(state))
