"""What values and codes look like in finished runs: ``python -m analysis.distributions runs=GLOB [images=500]``.

For every layer, the histogram of its latent weight and of its input on test images; where they are quantized, the share
of each code, the values that the codes stand for, learned thresholds and the relative squared error. Kept in the run
folder as the measurement ``distribution``, so that figures need no weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from analysis.cli import REQUIRED, script
from analysis.collect import Row, collect
from research.deploy import load_artifact
from research.learning.finalise import SINGLE
from research.quant.layers import QuantLayer, quant_layers
from research.quant.quantizers import Quantizer
from research.quant.quantizers.n2uq import N2UQ
from research.results import artifact_place, recorded_data
from research.runs.folder import RunFolder
from research.runs.measurements import measured

KIND = "distribution"
BIN, REACH = 0.05, 5.0
MAX_BITS = 4
"""Codes and levels of wider quantizers are not kept."""

Layers = dict[str, dict[str, Any]]
"""By layer and slot (``weight``, ``input``), what `distribution_of` gives."""


def histogram(values: Tensor) -> dict[str, Any]:
    """Shares of ``values`` (any shape) in bins of width 0.05 from -5 to 5, what lies beyond in the outermost.

    Returns:
        ``start``: left end of the first bin that is not empty; ``share``: of this bin and those up to the last one that
        is not empty.
    """
    count = round(2 * REACH / BIN)
    limit = REACH - BIN / 2
    counts = torch.histc(values.double().clamp(-limit, limit), count, -REACH, REACH)
    first, last = (int(i) for i in counts.nonzero().flatten()[[0, -1]])
    share = counts[first : last + 1] / counts.sum()
    return {"start": round(first * BIN - REACH, 6), "share": _rounded(share)}


def density(kept: Mapping[str, Any], merge: int = 1) -> tuple[list[float], list[float]]:
    """Borders (n + 1) and densities (n) of a kept `histogram`, ``merge`` bins in one."""
    share = list(kept["share"]) + [0.0] * (-len(kept["share"]) % merge)
    width = merge * BIN
    groups = [sum(share[i : i + merge]) for i in range(0, len(share), merge)]
    return [kept["start"] + width * i for i in range(len(groups) + 1)], [group / width for group in groups]


def distribution_of(values: Tensor, quantizer: Quantizer | None) -> dict[str, Any]:
    """Histogram and, if there is a quantizer, what it makes of the values; the unit is their root mean square.

    A quantizer per channel has the root mean square of each channel as its unit; levels are then means over channels.

    Args:
        values: the latent weight, or inputs.
        quantizer: as deployed: that of a weight holds its codes.

    Returns:
        ``rms``, ``kurtosis`` (of the population), ``histogram``; of quantized tensors ``bits``, ``kind`` of the grid,
        ``error`` (mean squared error over mean square; large where a quantizer gives its tensor another scale, which a
        layer behind it makes up for), and up to 4 bits ``codes``, their ``share`` and ``levels``; ``thresholds`` where
        they are learned.
    """
    axis = None if quantizer is None else quantizer.channel_axis
    axes = [i for i in range(values.ndim) if i != axis]
    unit = values.square().mean(dim=axes, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    centred = (values - values.mean()).double()
    found: dict[str, Any] = {
        "rms": float(values.square().mean().sqrt()),
        "kurtosis": float((centred**4).mean() / centred.square().mean().clamp(min=1e-30) ** 2),
        "histogram": histogram(values / unit),
    }
    if quantizer is None:
        return found
    codes = quantizer.codes(values)
    quantized = quantizer.dequantize(codes)
    found |= {
        "bits": float(quantizer.bits.mean()),
        "kind": quantizer.grid.kind,
        "error": float((quantized - values).square().mean() / values.square().mean()),
    }
    if found["bits"] > MAX_BITS:
        return found
    low, high = (int(limit.max()) for limit in quantizer.limits())
    every = list(range(low, high + 1, 2 if quantizer.grid.kind == "midrise" else 1))
    state = torch.zeros(unit.shape if axis is not None else (), dtype=torch.int32)
    levels = [(quantizer.dequantize(state + code) / unit.view(state.shape)).mean() for code in every]
    found |= {
        "codes": every,
        "share": _rounded(torch.stack([(codes == code).double().mean() for code in every])),
        "levels": _rounded(torch.stack(levels)),
    }
    if isinstance(quantizer, N2UQ) and quantizer.scale1 is not None:
        found["thresholds"] = _rounded(quantizer.thresholds / (quantizer.scale1 * unit.view(())))
    return found


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]


@torch.no_grad()
def layer_distributions(folder: RunFolder, name: str, images: Tensor) -> Layers:
    """`distribution_of` every layer's latent weight and input.

    Args:
        folder: a finished run with its weights.
        name: deployment.
        images: network inputs (N, C, H, W).
    """
    net = load_artifact(artifact_place(folder, name))
    latent = load_file(weights_path(folder, name))
    seen: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda module, inputs, name=name: seen.__setitem__(name, inputs[0]))
        for name, layer in quant_layers(net)
    ]
    net(images)
    for handle in handles:
        handle.remove()
    return {name: _slots(layer, latent[f"{name}.weight"], seen[name]) for name, layer in quant_layers(net)}


def _slots(layer: QuantLayer, weight: Tensor, inputs: Tensor) -> dict[str, Any]:
    return {
        "weight": distribution_of(weight, layer.weight_quantizer),
        "input": distribution_of(inputs, layer.input_quantizer),
    }


def weights_path(folder: RunFolder, name: str) -> Path:
    """Weights of the finalised network of deployment ``name``."""
    return folder.final if name == SINGLE else folder.path / f"final-{name}.safetensors"


def distributions(row: Row, images: int = 500) -> Layers | None:
    """The kept measurement of a deployment, or a new one if its weights are there; None if neither is.

    Args:
        row: a deployment as ``collect`` gives it.
        images: how many test images a new measurement looks at.
    """
    name = row["name"]
    if row["path"] is None or not weights_path(RunFolder.existing(row["path"]), name).is_file():
        kept = [record for record in row["run"].measurements if record["kind"] == KIND]
        own = [record["values"] for record in kept if record["settings"]["deployment"] == name]
        return own[-1] if own else None
    folder = RunFolder.existing(row["path"])

    def measure() -> Layers:
        data = recorded_data(folder, {"data": os.environ.get("FLATBIT_DATA", "data")})
        batches = islice(data.test_dataloader(), -(-images // data.eval_batch_size))
        return layer_distributions(folder, name, torch.cat([inputs for inputs, _ in batches])[:images])

    settings = {"deployment": name, "images": images, "bin": BIN, "reach": REACH}
    values: Layers = measured(folder, KIND, settings, weights_path(folder, name), measure)["values"]
    return values


def main(runs: str, images: int) -> None:
    """Measure every finished run that matches.

    Args:
        runs: glob over run folders.
        images: how many test images the inputs come from.
    """
    if images < 1:
        raise ValueError(f"images={images}: use 1 or more, such as 500")
    for row in collect(runs):
        found = distributions(row, images)
        if found is None:
            raise ValueError(f"{row['path']} has no {weights_path(RunFolder.existing(row['path']), row['name']).name}")
        print(f"{row['path']}: {row['name']}, {len(found)} layers")


if __name__ == "__main__":
    script(main, {"runs": REQUIRED, "images": 500})
