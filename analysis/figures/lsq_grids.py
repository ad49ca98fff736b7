"""Weights and activations over their grids: ``python -m analysis.figures.lsq_grids runs=DIR,DIR [layer=NAME]``.

For each run: histogram of one layer's latent weights and of its inputs on test images, in units of the layer's scale,
with the levels of the grid as vertical lines and the share of values at each level.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import MaxNLocator
from safetensors.torch import load_file
from torch import Tensor

from analysis.cli import REQUIRED, script
from analysis.collect import Row, collect
from research.config import build_data
from research.deploy import load_artifact
from research.quant.layers import QuantLayer
from research.results import artifact_place
from research.runs.folder import RunFolder

STYLE = Path(__file__).parent.parent / "style.mplstyle"
SLOTS = ("weight", "input")


@torch.no_grad()
def layer_values(row: Row, layer: str, images: Tensor) -> dict[str, dict[str, Any]]:
    """Latent values, scale and levels of a layer's weight and input quantizers.

    Args:
        row: a deployment as ``collect`` gives it.
        layer: name of a quantized layer.
        images: network inputs (N, C, H, W).

    Returns:
        By slot: ``values`` (1-D, in units of the scale), ``levels`` (codes), ``share`` (fraction at each level) and
        ``bits``.

    Raises:
        ValueError: no such layer, or one without quantizers.
    """
    folder = RunFolder.existing(row["path"])
    net = load_artifact(artifact_place(folder, row["name"]))
    modules = {name: module for name, module in net.named_modules() if isinstance(module, QuantLayer)}
    found = modules.get(layer)
    if found is None or found.weight_quantizer is None or found.input_quantizer is None:
        raise ValueError(f"layer={layer}: no layer with quantized weight and input; use one of {', '.join(modules)}")
    latent = load_file(folder.final)[f"{layer}.weight"]
    seen: list[Tensor] = []
    handle = found.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    net(images)
    handle.remove()
    result = {}
    for slot, quantizer, values in (
        ("weight", found.weight_quantizer, latent),
        ("input", found.input_quantizer, torch.cat(seen)),
    ):
        codes = found.weight_quantizer.codes(latent) if slot == "weight" else found.input_quantizer.codes(values)
        low, high = (int(limit) for limit in quantizer.limits())
        levels = np.arange(low, high + 1)
        share = np.array([float((codes == level).float().mean()) for level in levels])
        scale = quantizer.scale.reshape(-1)[0]
        result[slot] = {
            "values": (values / scale).reshape(-1).numpy(),
            "levels": levels,
            "share": share,
            "bits": int(quantizer.bits),
        }
    return result


def draw(rows: list[Row], found: list[dict[str, dict[str, Any]]], layer: str, output: Path) -> None:
    """Draw one column per run and write PDF, PNG and the data as CSV."""
    output.mkdir(parents=True, exist_ok=True)
    table: list[tuple[Any, ...]] = []
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(2, len(rows), figsize=(3.6 * len(rows), 4.6), squeeze=False)
        for column, (row, slots) in enumerate(zip(rows, found, strict=True)):
            for line, slot in enumerate(SLOTS):
                axis, data = axes[line][column], slots[slot]
                low, high = data["levels"][0] - 1.5, data["levels"][-1] + 1.5
                values = np.clip(data["values"], low, high)
                density, edges = np.histogram(values, bins=120, range=(low, high), density=True)
                axis.stairs(density, edges, fill=True, color="0.75", label="before quantization")
                axis.vlines(data["levels"], 0, 2, color="0.2", lw=0.6, ls="--")
                axis.plot(data["levels"], data["share"], "ok", markersize=3.5, label="share of each level")
                axis.set_xlabel(f"{slot} / scale (codes)")
                axis.set_ylabel("density, share")
                axis.set_ylim(0, 1.15 * max(data["share"].max(), float(np.quantile(density, 0.98))))
                axis.xaxis.set_major_locator(MaxNLocator(integer=True))
                axis.set_title(f"{row['experiment']}\n{layer} {slot}, {data['bits']} bit")
                table += [(row["experiment"], slot, int(level), share)
                          for level, share in zip(data["levels"], data["share"], strict=True)]  # fmt: skip
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        for suffix in ("pdf", "png"):
            figure.savefig(output / f"lsq_grids.{suffix}")
        plt.close(figure)
    with (output / "lsq_grids.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("experiment", "slot", "code", "share"))
        writer.writerows(table)


def main(runs: str, layer: str, output: str, data: str) -> None:
    """Draw the figure for several runs of one model.

    Args:
        runs: run folders or globs, separated by commas.
        layer: quantized layer to look at.
        output: folder for ``lsq_grids.{pdf,png,csv}``.
        data: folder of the data sets (the embedded set needs none).
    """
    rows = [row for pattern in runs.split(",") for row in collect(pattern)]
    found = []
    for row in rows:
        source = build_data({**row["config"], "paths": {"data": data}}, trusted=False)
        images, _ = next(iter(source.test_dataloader()))
        found.append(layer_values(row, layer, images))
    draw(rows, found, layer, Path(output))
    print(f"wrote {Path(output) / 'lsq_grids.pdf'}, .png and .csv")


if __name__ == "__main__":
    script(main, {"runs": REQUIRED, "layer": "layer2.0.conv2", "output": "figures", "data": "data"})
