"""Every command of the README runs, in its order, in an empty folder; trainings are cut short by further overrides."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHORT = "data.limit_train=256 data.validation=100 trainer.max_steps=2 logger.wandb.mode=disabled"


def readme_commands() -> list[str]:
    """The commands in the README's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.strip().splitlines()]


def test_the_readme_has_the_promised_commands_in_order() -> None:
    wanted = ["make train", "make test", "experiment=", "callbacks=[", "seed=1,2", "seed=1,2"]
    wanted += [
        "evaluate",
        "ptq",
        "export",
        "tables",
        "report",
        "curvature",
        "plan",
        "status",
        "make figures",
        "cifar10",
    ]
    commands = readme_commands()
    assert len(commands) == len(wanted)
    for part, command in zip(wanted, commands, strict=True):
        assert part in command


@pytest.mark.parametrize("target", ["train", "test", "figures"])
def test_make_targets_resolve(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wanted = {"train": "analysis.main_job", "test": "pytest tests", "figures": "analysis.figures runs=tests/records"}
    assert wanted[target] in done.stdout


def shell(command: str, folder: Path, **environment: str) -> str:
    """Run a command as a reader would, with this interpreter as ``python``; its output."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "FLATBIT_RUNS": "runs", **environment}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_readme_commands(tmp_path: Path) -> None:
    for command in readme_commands():
        environment = {}
        if command in ("make test", "make figures"):
            continue  # this very run; every figure has its test in tests/analysis/test_figures.py
        if command == "make train":
            output = shell(f"python -m analysis.main_job 'overrides={SHORT}'", tmp_path)
            assert output.count("run folder: ") == 3
            assert {path.suffix for path in (tmp_path / "runs" / "figures").iterdir()} == {".pdf", ".png", ".csv"}
            continue
        if "data=cifar10" in command:
            data = Path(os.environ.get("FLATBIT_DATA", ROOT.parent / "shared" / "data"))
            if not (data / "cifar10.npz").is_file():
                continue
            environment["FLATBIT_DATA"] = str(data)
            command += " model.width=4"  # 10,000 test images on one thread
        if "$RUN" in command:
            environment["RUN"] = str(min((tmp_path / "runs" / "ablation").iterdir()))
        if "$FLOAT_RUN" in command:
            (float_run,) = (tmp_path / "runs" / "float_resnet8_embedded").iterdir()
            environment["FLOAT_RUN"] = str(float_run)
        if "research.train" in command:
            command += " " + " ".join(o for o in SHORT.split() if o.split("=")[0] not in command)
        output = shell(command, tmp_path, **environment)
        if "research.evaluate" in command:
            assert "recorded_accuracy" in output
        if "analysis.tables" in command:
            assert output.count("| ablation |") == 2  # with and without the mechanic, two seeds in each line
            assert "1, 2" in output
        if "analysis.curvature" in command:
            assert "quantized" in output
        if "analysis.plan" in command:
            assert output.count("missing") >= 18
        if "analysis.status" in command:
            assert "4 done" in output
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "exported" / "model.onnx").is_file()
    assert len(list((tmp_path / "runs" / "ablation").iterdir())) == 4
