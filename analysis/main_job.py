"""The main job of ``make train``: float baseline, W4A4 and W2A2 from it, table and figure; nothing is asked."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from analysis.cli import script
from analysis.collect import collect
from research.runs.folder import RunFolder

FLOAT = "float_resnet8_embedded"
QUANTIZED = ("lsq_resnet8_embedded_w4a4", "lsq_resnet8_embedded_w2a2")


def train(experiment: str, runs: str, overrides: Sequence[str]) -> None:
    """Run ``python -m research.train experiment=...`` and show its output.

    Raises:
        ValueError: the training failed; its own message stands above.
    """
    command = [sys.executable, "-m", "research.train", f"experiment={experiment}", f"paths.runs={runs}", *overrides]
    print(f"\n$ python {' '.join(command[1:])}", flush=True)
    if subprocess.run(command, check=False).returncode != 0:
        raise ValueError(f"experiment={experiment} failed: see its message above")


def finished_runs(runs: str, experiment: str) -> list[RunFolder]:
    """Finished runs of an experiment, the latest last."""
    folders = [RunFolder.existing(path.parent) for path in Path(runs, experiment).glob("*/config.yaml")]
    return sorted((f for f in folders if f.finished), key=lambda folder: folder.summary_path.stat().st_mtime)


def report(runs: str, paths: Sequence[Path]) -> str:
    """The closing table: accuracies, size, BOPs, compression and seconds of each run."""
    header = f"{'run':<28}{'float':>8}{'quantized':>11}{'deployed':>10}{'KiB':>8}{'x':>7}{'GBOPs':>8}{'s':>6}"
    lines = [header, "-" * len(header)]
    for path in paths:
        for row in collect(str(path)):
            full = row["accuracy"] if row["float_accuracy"] is None else row["float_accuracy"]
            quantized = "–" if row["float_accuracy"] is None else f"{100 * row['accuracy']:.2f}"
            lines.append(
                f"{row['experiment']:<28}{100 * full:>8.2f}{quantized:>11}{100 * row['deployed_accuracy']:>10.2f}"
                f"{row['size_kib']:>8.1f}{row['compression']:>7.2f}{row['bops'] / 1e9:>8.3f}{row['seconds']:>6.0f}"
            )
    return "\n".join(lines)


def main(runs: str, overrides: str) -> None:
    """Train the three runs, then print the table and draw the figure.

    Args:
        runs: folder of the run folders.
        overrides: further overrides of all three, separated by blanks.
    """
    started = time.monotonic()
    shared = overrides.split()
    train(FLOAT, runs, shared)
    baseline = finished_runs(runs, FLOAT)[-1]
    for experiment in QUANTIZED:
        train(experiment, runs, [f"init_from={FLOAT}/{baseline.hash}", *shared])
    paths = [baseline.path, *(finished_runs(runs, experiment)[-1].path for experiment in QUANTIZED)]
    figure = Path(runs) / "figures"
    subprocess.run(
        [sys.executable, "-m", "analysis.figures.lsq_grids", f"runs={paths[1]},{paths[2]}", f"output={figure}"],
        check=True,
    )
    print(f"\n{report(runs, paths)}\n")
    print("accuracies in % of the 2,000 test images; deployed: the integer network in ONNX Runtime")
    print(f"figure: {figure / 'lsq_grids.pdf'}")
    for path in paths:
        print(f"run folder: {path}")
    print(f"{time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    script(main, {"runs": "runs", "overrides": ""})
