"""Images a second of exported networks in ONNX Runtime and OpenVINO, integer and float in turn.

One engine to a process, in which PyTorch computes nothing: the spinning threads of two libraries slow each other.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from analysis.benchmark.interleaved import interleaved, ratios
from analysis.train_config import train_config
from research.config import build_module
from research.deploy import export_onnx, round_biases
from research.quant.batchnorm import reestimate_batchnorm
from research.quant.calibrate import calibrate
from research.quant.conv_bn import merge_batchnorm

Array = npt.NDArray[np.float32]
Run = Callable[[Array], Array]

FLOAT = "float"
NARROW = "quantizer.rules.3.output.narrow=true"
VARIANTS: dict[str, list[str]] = {
    FLOAT: ["quantizer=float"],
    "W8A8, lsq_deploy": ["quantizer=lsq_deploy"],
    "W8A8, lsq_deploy, narrow codes at the adds": ["quantizer=lsq_deploy", NARROW],
    "W8A8, lsq": ["quantizer=lsq", "quantizer.bits=8"],
    "W4A4, lsq_deploy": ["quantizer=lsq_deploy", "quantizer.bits=4", "quantizer.rules.2.input.bits=4"],
}
"""Networks by name, as overrides of the recipe; the first is what the others are compared with."""

ENGINES: dict[str, tuple[str, dict[str, str]]] = {
    "ONNX Runtime": ("onnxruntime", {}),
    "OpenVINO, float32": ("openvino", {"INFERENCE_PRECISION_HINT": "f32"}),
    "OpenVINO, its default precision": ("openvino", {}),
}
"""Engines by name: package and options."""


def build_network(overrides: list[str], model: str, images: Tensor) -> nn.Module:
    """A network as a run would finish it: calibrated, batch-norm re-estimated and merged, biases rounded.

    Weights are random, the same for every recipe: what is measured is speed and whether engines agree.
    """
    config = train_config([f"model={model}", "data=synthetic", *overrides])
    torch.manual_seed(0)
    net = build_module(config).net
    for _ in range(2):  # ranges and statistics depend on each other
        calibrate(net, [images], force=True)
        reestimate_batchnorm(net, [images])
    merge_batchnorm(net)
    net.eval()
    round_biases(net, images[:1])
    return net


def run_onnxruntime(path: str, batch: int, threads: int, options: dict[str, str]) -> Run:
    """A session for one batch size."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.add_free_dimension_override_by_name("batch", batch)
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"input": images})[0]


def run_openvino(path: str, batch: int, threads: int, options: dict[str, str]) -> Run:
    """A compiled network for one batch size."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape([batch, *(int(size.get_length()) for size in list(model.input().partial_shape)[1:])])
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, **options}
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda images: np.array(next(iter(request.infer({"input": images}).values())))


def engine_process(arguments: str) -> None:
    """Measure one engine on the files of a folder; prints JSON. The body of a process of its own.

    Args:
        arguments: JSON of ``engine``, ``folder``, ``networks``, ``batches``, ``rounds`` and ``threads``.
    """
    given = json.loads(arguments)
    package, options = ENGINES[given["engine"]]
    prepare = {"onnxruntime": run_onnxruntime, "openvino": run_openvino}[package]
    folder, found = Path(given["folder"]), {}
    images = np.load(folder / "images.npy")
    for batch in given["batches"]:
        calls, agreement = {}, {}
        for index, name in enumerate(given["networks"]):
            run = prepare(str(folder / f"{index}.onnx"), batch, given["threads"], options)
            parts = [run(images[start : start + batch]) for start in range(0, len(images), batch)]
            agreement[name] = agreement_of(np.concatenate(parts), np.load(folder / f"{index}.npy"))
            calls[name] = lambda run=run, batch=batch: repeat(run, images[:batch], max(1, 16 // batch))
        timed = ratios(interleaved(calls, given["rounds"]), given["networks"][0])
        count = batch * max(1, 16 // batch)
        found[str(batch)] = {
            name: {"images_per_second": 1e3 * count / cell["ms"], "speedup": 1 / cell["ratio"],
                   "low": 1 / cell["high"], "high": 1 / cell["low"], **agreement[name]}
            for name, cell in timed.items()
        }  # fmt: skip
    print(json.dumps(found))


def repeat(run: Run, images: Array, times: int) -> None:
    """Run several times, so that a sample is not a fraction of a millisecond."""
    for _ in range(times):
        run(images)


def agreement_of(found: Array, expected: Array) -> dict[str, float]:
    """``max_abs_diff`` of the outputs and ``argmax_agreement``."""
    return {
        "max_abs_diff": float(np.abs(found - expected).max()),
        "argmax_agreement": float((found.argmax(1) == expected.argmax(1)).mean()),
    }


def write_networks(folder: Path, model: str, images: Tensor) -> None:
    """Each variant as ``<index>.onnx``, what PyTorch computes as ``<index>.npy``, and ``images.npy``."""
    np.save(folder / "images.npy", images.numpy())
    for index, overrides in enumerate(VARIANTS.values()):
        net = build_network(overrides, model, images)
        export_onnx(net, images[:1], folder / f"{index}.onnx")
        with torch.no_grad():
            np.save(folder / f"{index}.npy", net(images).numpy())


def measure(rounds: int, model: str, batches: list[int] | None = None, size: int = 32) -> dict[str, Any]:
    """By engine: its ``version`` and by batch size and network ``images_per_second``, ``speedup`` over float with the
    quartiles ``low`` and ``high`` of single rounds, ``max_abs_diff`` and ``argmax_agreement`` with PyTorch; or, for an
    engine that is not installed, why it is ``skipped``.
    """
    batches = batches or [1, 64]
    images = torch.randn(max(batches), 3, size, size, generator=torch.Generator().manual_seed(1))
    found: dict[str, Any] = {}
    with TemporaryDirectory() as place:
        write_networks(Path(place), model, images)
        for engine, (package, _) in ENGINES.items():
            if importlib.util.find_spec(package) is None:
                found[engine] = {"skipped": f"{package} is not installed: pip install '.[{package}]'"}
                continue
            arguments: dict[str, Any] = {"engine": engine, "folder": place, "networks": list(VARIANTS)}
            arguments |= {"batches": batches, "rounds": rounds, "threads": torch.get_num_threads()}
            call = f"engine_process({json.dumps(arguments)!r})"
            code = f"from analysis.benchmark.inference import engine_process\n{call}\n"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{engine}: {done.stderr.strip()[-2000:]}")
            values = json.loads(done.stdout.splitlines()[-1])
            found[engine] = {"version": importlib.metadata.version(package), "batches": values}
    return found
