"""What re-estimated batch-norm statistics are worth: ``python -m analysis.batchnorm runs=GLOB [batches=20]``.

Test accuracy of finalised networks with the running averages of training, and with statistics estimated anew over
training batches. Kept in the run folder as the measurement ``batchnorm``; the run itself stays what it is. A run with
``finalise.batchnorm_batches`` has both accuracies in its summary already.
"""

from __future__ import annotations

import copy
from typing import Any

from analysis.cli import REQUIRED, script
from analysis.collect import Row, collect
from analysis.subject import DATA, run_folder
from research.learning.finalise import measure as accuracy_of
from research.quant.batchnorm import reestimate_batchnorm
from research.results import finished_network, recorded_data, statistics_batches, test_batches, weights_place
from research.runs.measurements import Measurement, measured
from research.targets import resolve_target

KIND = "batchnorm"


def measure_batchnorm(row: Row, batches: int, data: str) -> Measurement:
    """The measurement of a deployment, from its run folder or taken and kept there.

    Args:
        row: a deployment as ``collect`` gives it.
        batches: training batches of the re-estimation, augmented as in training.
        data: folder of the data sets.

    Returns:
        The measurement; its values are the accuracies ``before`` and ``after``, 0 to 1.

    Raises:
        ValueError: the run's statistics were re-estimated when it ended, or there are fewer batches.
    """
    folder = run_folder(row)
    if row["config"]["finalise"]["batchnorm_batches"]:
        raise ValueError(f"runs=: {row['experiment']}/{row['hash']} has accuracy_before_batchnorm in its summary")

    def take() -> dict[str, Any]:
        source = recorded_data(folder, {"data": data})
        source.check_calibration("batches", batches, source.batch_size)
        net = finished_network(folder, row["name"])
        anew = copy.deepcopy(net)
        reestimate_batchnorm(anew, statistics_batches(source, batches))
        task, tests = resolve_target(row["config"]["task"], key="task"), test_batches(source)
        return {name: accuracy_of(n, task, tests)["accuracy"] for name, n in (("before", net), ("after", anew))}

    settings = {"deployment": row["name"], "part": "test", "batches": batches}
    return measured(folder, KIND, settings, weights_place(folder, row["name"]), take)


def main(runs: str, batches: int, data: str) -> None:
    """Measure every deployment that matches.

    Args:
        runs: glob over run folders.
        batches: training batches of the re-estimation.
        data: folder of the data sets.
    """
    if batches < 1:
        raise ValueError(f"batches={batches}: use 1 or more, such as 20")
    for row in collect(runs):
        values = measure_batchnorm(row, batches, data)["values"]
        print(f"{row['experiment']}/{row['hash']} {row['name']}: {values['before']:.4f} -> {values['after']:.4f}")


if __name__ == "__main__":
    script(main, {"runs": REQUIRED, "batches": 20, "data": DATA})
