"""How often codes jumped back in finished runs: ``python -m analysis.oscillation runs=GLOB``.

For every layer that ``oscillation_tracker`` followed, how many weights oscillated 0, 1, 2, ... times in the whole run,
from the run's last checkpoint. Kept in the run folder as the measurement ``oscillation``, so that figures need no
weights.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from analysis.cli import REQUIRED, script
from analysis.collect import Row, collect
from analysis.subject import run_folder
from research.runs.checkpoint import LAST, load_checkpoint
from research.runs.measurements import Measurement, measured

KIND = "oscillation"
TRACKER = "oscillation_tracker"
COUNTS = re.compile(rf"mechanics\.{TRACKER}\.(.+)\.oscillations")


def oscillation_counts(row: Row) -> Measurement:
    """The measurement of a run, from its folder or taken and kept there.

    Args:
        row: a deployment as ``collect`` gives it.

    Returns:
        The measurement; its values are ``steps`` and, by layer, ``counts``: how many weights oscillated 0, 1, ... times
        up to the greatest number there is.

    Raises:
        ValueError: the run had no tracker, or its last checkpoint is missing.
    """
    folder = run_folder(row)
    if TRACKER not in row["mechanics"]:
        raise ValueError(f"runs=: {row['experiment']}/{row['hash']} counted nothing: train with callbacks=[{TRACKER}]")

    def measure() -> dict[str, Any]:
        state = load_checkpoint(folder.checkpoints / LAST)["state_dict"]
        found = {match[1]: value for key, value in state.items() if (match := COUNTS.fullmatch(key))}
        counts = {
            name.replace("-", "."): torch.bincount(value.flatten().long()).tolist() for name, value in found.items()
        }
        return {"steps": row["steps"], "counts": counts}

    return measured(folder, KIND, {"part": "train"}, folder.checkpoints / LAST, measure)


def main(runs: str) -> None:
    """Count every run with a tracker, and print the share of its weights that oscillated.

    Args:
        runs: glob over run folders; those without a tracker are named.
    """
    rows = list({row["path"]: row for row in collect(runs)}.values())
    if not any(TRACKER in row["mechanics"] for row in rows):
        raise ValueError(f"runs={runs}: none of them counted anything; train with callbacks=[{TRACKER}]")
    for row in rows:
        if TRACKER not in row["mechanics"]:
            print(f"{row['experiment']}/{row['hash']}: left out, no {TRACKER}")
            continue
        counts = oscillation_counts(row)["values"]["counts"]
        weights = sum(map(sum, counts.values()))
        share = 1 - sum(layer[0] for layer in counts.values()) / weights
        print(f"{row['experiment']}/{row['hash']}: {share:.2%} of {weights} weights oscillated")


if __name__ == "__main__":
    script(main, {"runs": REQUIRED})
