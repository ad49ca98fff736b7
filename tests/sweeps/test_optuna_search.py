"""The search: one journal, many workers, none of whose trials is lost or done twice, whoever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("optuna", reason="the search needs Optuna: pip install -e '.[optuna]'")

import optuna
from optuna.trial import FrozenTrial, TrialState

from sweeps import optuna_search, search_training
from sweeps.optuna_search import run, study_folder, text
from sweeps.search_definition import FOLDER, Search, read_search
from sweeps.search_study import SearchStudy, journal
from tests.test_config import build, composed

ROOT = Path(__file__).resolve().parents[2]
PRETEND = Path(__file__).with_name("pretend_training.py")
LAUNCH = (
    "import sys; from sweeps import optuna_search, search_training; "
    f"search_training.COMMAND = (sys.executable, {str(PRETEND)!r}); optuna_search.POLL = 0.02; optuna_search.main()"
)
BASE: dict[str, Any] = {
    "name": "tried",
    "trials": 6,
    "objectives": {"accuracy": "maximize"},
    "sampler": {"name": "tpe", "seed": 3, "n_startup_trials": 2},
    "space": {"x": {"type": "float", "low": 0.1, "high": 0.9}},
}


class Place:
    """A search file and a folder for its runs."""

    def __init__(self, folder: Path, real: bool = False, **changes: Any) -> None:
        self.runs = folder / "runs"
        self.file = folder / "search.yaml"
        self.command = ["-m", "sweeps.optuna_search"] if real else ["-c", LAUNCH]
        folder.mkdir(exist_ok=True)
        self.file.write_text(yaml.safe_dump({**BASE, **changes}, sort_keys=False))

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *self.command, f"search={self.file}", f"paths.runs={self.runs}", *words],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as shells start background jobs
        )

    def run(self, *words: str) -> int:
        return run([f"search={self.file}", f"paths.runs={self.runs}", *words])

    @property
    def search(self) -> Search:
        return read_search(str(self.file))

    @property
    def study(self) -> Path:
        return study_folder(self.search, self.runs)

    def trials(self) -> list[FrozenTrial]:
        storage = optuna.storages.JournalStorage(journal(self.study))
        return optuna.load_study(study_name=self.search.name, storage=storage).get_trials()

    def folder(self, trial: FrozenTrial) -> Path:
        return self.runs / str(trial.user_attrs["run"])

    def starts(self) -> list[int]:
        """How often the training of each run folder was started from nothing or gone on with."""
        return [len(path.read_text().splitlines()) for path in sorted(self.runs.glob("tried/*/starts"))]


def record(trials: Sequence[FrozenTrial]) -> list[tuple[Any, ...]]:
    """What does not depend on when and by whom a trial was done."""
    return [(t.number, t.state, t.values, t.params, t.intermediate_values, t.user_attrs) for t in trials]


def states(trials: Sequence[FrozenTrial]) -> list[str]:
    return [trial.state.name for trial in trials]


@pytest.fixture(autouse=True)
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches of this process start the pretended training, and look after it often."""
    monkeypatch.setattr(search_training, "COMMAND", (sys.executable, str(PRETEND)))
    monkeypatch.setattr(optuna_search, "POLL", 0.02)


def test_a_search_ends_with_its_trials_and_the_best_is_what_a_summary_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path)
    assert place.run() == 0
    trials = place.trials()
    assert states(trials) == ["COMPLETE"] * 6
    best = max(trials, key=lambda trial: trial.values[0])
    assert best.values == [summary(place.folder(best))["accuracy"]] == [best.params["x"]]
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"best: trial {best.number}"
    assert f"| {best.number} | complete | {best.values[0]:.6g} | {best.params['x']:.6g} | tried/" in out
    assert place.run("show") == place.run() == 0
    assert capsys.readouterr().out == 2 * out[out.index("| trial") :]
    assert place.run("search.trials=8") == 0
    assert record(place.trials()[:6]) == record(trials) and states(place.trials()) == ["COMPLETE"] * 8
    assert place.starts() == [1] * 8


@pytest.mark.parametrize("both", [True, False], ids=["worker_and_training", "worker_alone"])
def test_a_killed_search_goes_on_as_if_it_had_not_been(tmp_path: Path, both: bool) -> None:
    whole, killed = (Place(tmp_path / name, trials=4) for name in ("whole", "killed"))
    flag = tmp_path / "flag"
    words = [f"kill={flag}", "delay=0.1", *(["kill_both=1"] if both else [])]
    assert whole.run(*words) == 0
    flag.touch()
    assert killed.start(*words).wait() == -signal.SIGKILL
    # with its training alive, the trial is nobody's to take: the next worker waits for it, and never trains it again
    assert killed.run(*words) == 0
    assert record(killed.trials()) == record(whole.trials())
    assert sorted(killed.starts()) == ([1] * 3 + [2] if both else [1] * 4)


def test_a_trial_whose_worker_was_killed_before_it_drew_gets_its_parameters(tmp_path: Path) -> None:
    place = Place(tmp_path, trials=2)
    SearchStudy(place.search, place.study).study.ask()
    assert place.run() == 0
    assert states(place.trials()) == ["COMPLETE"] * 2


def test_poor_trials_are_given_up_in_mid_training_and_marked(tmp_path: Path) -> None:
    pruner = {"name": "median", "monitor": "val/accuracy", "n_startup_trials": 2, "n_warmup_steps": 1}
    place = Place(tmp_path, pruner=pruner, sampler={"name": "random", "seed": 6}, trials=5)
    assert place.start("delay=100", "slow_below=0.5").wait() == 0
    trials = place.trials()
    poor = [trial for trial in trials if trial.params["x"] < 0.5]
    assert poor and min(trial.number for trial in poor) >= 2
    for trial in trials:
        folder = place.folder(trial)
        assert (trial.state == TrialState.PRUNED) == (trial in poor) == (not (folder / "summary.json").exists())
        epochs = 2 if trial in poor else 4
        assert trial.intermediate_values == {epoch: trial.params["x"] * (epoch + 1) for epoch in range(epochs)}
        if trial in poor:
            assert (folder / "pruned.txt").read_text() == f"tried, trial {trial.number}, after epoch 2\n"


def test_the_last_epoch_prunes_nothing(tmp_path: Path) -> None:
    pruner = {"name": "median", "monitor": "val/accuracy", "n_startup_trials": 1, "n_warmup_steps": 3}
    place = Place(tmp_path, pruner=pruner)
    assert place.run() == 0
    assert states(place.trials()) == ["COMPLETE"] * 6


def test_a_failed_training_fails_its_trial_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Place(tmp_path, sampler={"name": "random", "seed": 0})
    assert place.run("fails_above=0.6") == 1
    trials = place.trials()
    failed = [trial for trial in trials if trial.params["x"] > 0.6]
    assert 0 < len(failed) < 6
    assert [trial.state == TrialState.FAIL for trial in trials] == [trial in failed for trial in trials]
    assert {trial.user_attrs["failure"] for trial in failed} == {"error: x is too large"}
    assert capsys.readouterr().err.startswith(f"error: {len(failed)} trials failed: {failed[0].number}")


def test_the_same_parameters_are_trained_once(tmp_path: Path) -> None:
    space = {"x": {"type": "categorical", "choices": [0.25, 0.5]}}
    place = Place(tmp_path, space=space, trials=7)
    other = place.start("delay=0.1")
    assert (place.run("delay=0.1"), other.wait()) == (0, 0)
    trials = place.trials()
    assert states(trials) == ["COMPLETE"] * 7
    assert place.starts() == [1, 1]
    assert all(trial.values == [trial.params["x"]] for trial in trials)
    first = {trial.params["x"]: trial.number for trial in reversed(trials)}
    assert all(trial.user_attrs.get("twin", trial.number) == first[trial.params["x"]] for trial in trials)


def test_two_objectives_end_in_a_front(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Place(tmp_path, objectives={"val/accuracy": "maximize", "macs": "minimize"}, trials=3)
    assert place.run() == 0
    assert all(trial.values == [4 * trial.params["x"], 10 * trial.params["x"]] for trial in place.trials())
    assert capsys.readouterr().out.splitlines()[-1] == "Pareto front: trial 0, trial 1, trial 2"
    place = Place(tmp_path, name="tried_too", objectives={"val/accuracy": "maximize", "bops": "minimize"}, trials=3)
    assert place.run() == 0
    best = max(place.trials(), key=lambda trial: trial.params["x"])  # best in both
    assert capsys.readouterr().out.splitlines()[-1] == f"Pareto front: trial {best.number}"


@pytest.mark.parametrize("whom", ["worker", "training"])
def test_a_signal_to_stop_ends_worker_and_training_and_leaves_the_trial_to_the_next(tmp_path: Path, whom: str) -> None:
    place = Place(tmp_path)
    worker = place.start("delay=100")
    wait_for(lambda: list(place.runs.glob("tried/*/pid")))
    (pid,) = place.runs.glob("tried/*/pid")
    os.kill(worker.pid if whom == "worker" else int(pid.read_text()), signal.SIGUSR2)
    assert worker.wait() == 128 + signal.SIGUSR2
    (trial,) = place.trials()
    assert trial.state == TrialState.RUNNING
    again = SearchStudy(read_search(str(place.file), overrides=["delay=100"]), place.study).claim()
    assert again is not None and again[0].params == trial.params, "its lock is free"


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({}, ["hello"], "use python -m sweeps.optuna_search"),
        ({}, ["search=again"], "search= is missing or given twice"),
        ({}, ["search.trails=3"], "search.trails is unknown: use name, objectives"),
        ({}, ["search.trials=0"], "search.trials=0: use a positive number"),
        ({}, ["search.trials=many"], "search.trials='many': use a positive number"),
        ({"name": "a/b"}, [], "search.name='a/b': use letters"),
        ({"space": {}}, [], "search.space={}: use `key: value` lines"),
        ({"space": {"x": 3}}, [], "search.space.x=3: use {type: float"),
        ({"space": {"x": {"type": "real"}}}, [], "search.space.x.type=real: use float, int, categorical"),
        ({"space": {"x": {"type": "float", "low": 1}}}, [], "search.space.x: FloatDistribution.__init__() missing"),
        ({"space": {"x": {"type": "float", "low": 2, "high": 1}}}, [], "search.space.x: `low <= high` must hold"),
        ({"objectives": {"accuracy": "up"}}, [], "search.objectives.accuracy=up: use maximize or minimize"),
        ({}, ["x=0"], "x=0: the search draws x"),
        ({"objectives": {"speed": "maximize"}}, [], "search.objectives.speed: not in the summary of"),
        ({"objectives": {"val/speed": "maximize"}}, [], "search.objectives.val/speed: "),
        ({}, ["search.sampler.name=grid"], "search.sampler.name=grid: use random, tpe, nsga2"),
        ({}, ["search.sampler.depth=3"], "search.sampler: TPESampler.__init__() got an unexpected"),
        ({}, ["search.pruner.name=median"], "search.pruner.monitor is missing"),
        ({}, ["name=other"], "name=other: runs lie in the folder of the search"),
        ({}, ["show"], "search.name=tried: no study in"),
        (
            {"objectives": {"accuracy": "maximize", "bops": "minimize"}, "pruner": {"name": "median", "monitor": "v"}},
            [],
            "search.pruner: several objectives cannot prune",
        ),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: list[str], message: str
) -> None:
    assert Place(tmp_path, **changes).run(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_an_unknown_search_names_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"search=lsq: no such file; use a .yaml file or one of .*lsq_bits"):
        read_search("lsq")


def test_a_study_is_one_of_one_search(tmp_path: Path) -> None:
    place = Place(tmp_path, trials=1)
    SearchStudy(place.search, place.study)
    SearchStudy(read_search(str(place.file), ["trials=9"], ["logger.wandb.mode=disabled"]), place.study)
    with pytest.raises(ValueError, match=r"search.name=tried: .* another search.sampler, search.overrides; use"):
        SearchStudy(read_search(str(place.file), ["sampler.seed=4"], ["seed=1"]), place.study)


def test_what_is_drawn_depends_on_the_number_and_the_seed_alone(tmp_path: Path) -> None:
    search = Place(tmp_path, sampler={"name": "random", "seed": 0}).search

    def draw(number: int) -> float:
        return optuna.create_study(sampler=search.sampler_of(number)).ask().suggest_float("x", 0, 1)

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_every_search_builds_at_both_ends_of_its_space(name: str) -> None:
    search = read_search(name)
    for end in (0, -1):
        drawn = []
        for key, entry in search.space.items():
            ends = entry["choices"] if entry["type"] == "categorical" else (entry["low"], entry["high"])
            drawn.append(f"{key}={text(ends[end])}")
        config = composed([*search.overrides, *drawn])
        build(config)
        if name == "lsq_bits":
            bits = [(rule["weight"]["bits"], rule["input"]["bits"]) for rule in config["quantizer"]["rules"]]
            assert bits == [(8, 8)] * 2 + [((2, 8)[end],) * 2] * 3


def test_drawn_values_are_written_as_overrides() -> None:
    assert [text(value) for value in (True, None, 1e-5, 3, "mse", "[sam]")] == [
        "true",
        "null",
        "1e-05",
        "3",
        "mse",
        "[sam]",
    ]


REAL = [
    "data=synthetic", "data.batch_size=32", "data.options.train=256", "data.options.test=64", "data.validation=64",
    "calibration.batch_size=32", "model=resnet8", "model.width=8", "trainer.max_epochs=6", "trainer.accelerator=cpu",
    "logger.wandb.mode=disabled", "deploy.onnx=false",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_two_real_workers_of_which_one_is_killed_with_its_training(tmp_path: Path) -> None:
    space = {
        "optimizer.lr": {"type": "float", "low": 0.01, "high": 0.3, "log": True},
        "quantizer.bits": {"type": "int", "low": 2, "high": 8},
    }
    place = Place(tmp_path, real=True, space=space, overrides=REAL, trials=3)
    first = place.start()
    wait_for(lambda: list(place.study.glob("trial-0.txt")))
    second = place.start()
    wait_for(lambda: "epoch 2, " in (place.study / "trial-0.txt").read_text())
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert place.trials()[0].state == TrialState.RUNNING
    first = place.start()
    assert [worker.wait() for worker in (first, second)] == [0, 0]
    trials = place.trials()
    assert states(trials) == ["COMPLETE"] * 3
    assert "resuming from" in (place.study / "trial-0.txt").read_text()
    folders = [place.folder(trial) for trial in trials]
    assert sorted(folders) == sorted(path.parent for path in place.runs.glob("tried/*/summary.json"))
    assert [trial.values for trial in trials] == [[summary(folder)["accuracy"]] for folder in folders]
    lines = [line for worker in (first, second) for line in worker.communicate()[0].splitlines()]
    assert sorted(line[:17] for line in lines if ": accuracy" in line) == [f"trial {n}: accuracy" for n in range(3)]


def summary(folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = json.loads((folder / "summary.json").read_text())["deployments"][0]
    return row


def wait_for(condition: Any, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
