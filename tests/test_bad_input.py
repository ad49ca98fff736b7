"""Whatever a user gets wrong: one line that names the config key, exit code 2, and nothing lost."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml

from research.evaluate import main as evaluate
from research.export import main as export
from research.learning.evaluation import Evaluation
from research.learning.mechanic import Mechanic
from research.runs.checkpoint import load_checkpoint
from research.runs.folder import RunFolder
from research.train import main as train

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "data=synthetic",
    "data.options.train=160",
    "data.options.test=20",
    "data.validation=20",
    "data.batch_size=35",
    "data.image_size=8",
    "model.width=4",
    "trainer.max_epochs=3",
    "trainer.accelerator=cpu",
    "calibration.batch_size=35",
    "deploy.onnx=false",
    "logger.wandb.mode=disabled",
)
STEPS_PER_EPOCH = 4


class Rival(Mechanic):
    """Claims what SAM claims."""

    slug = "rival"
    claims = frozenset({"evaluations"})


class Trouble(Mechanic):
    """Ends the run by an error after a step, or makes the loss of the step after it NaN, while it is armed."""

    slug = "trouble"
    armed = False

    def __init__(self, step: int, how: str) -> None:
        self.step, self.how = step, how

    def loss_terms(self, evaluation: Evaluation) -> dict[str, torch.Tensor]:
        due = self.how == "poison" and self.armed and self.module.progress.step == self.step
        return {"trouble": torch.tensor(float("nan") if due else 0.0)}

    def after_step(self, module: Any) -> None:
        if self.how == "stop" and self.armed and module.progress.step == self.step:
            raise ValueError("stopped")


def trouble(step: int, how: str) -> list[str]:
    return [f"+callbacks.trouble={{_target_: tests.test_bad_input.Trouble, step: {step}, how: {how}}}"]


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    def refusal(self) -> str:
        """The line of the error, after checking that it is the only one, the last one, and no traceback."""
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert self.code == 2 and len(errors) == 1, (self.code, self.err)
        assert self.err.splitlines()[-1] == errors[0] and "Traceback" not in self.err
        return errors[0]


def command(entry_point: Callable[[], None], *arguments: str) -> Outcome:
    """An entry point run in this process, with the command line's arguments; global settings are put back."""
    argv, handlers, level = sys.argv, logging.root.handlers[:], logging.root.level
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    sys.argv = [entry_point.__module__, *arguments]
    code: Any = 0
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        try:
            entry_point()
        except SystemExit as end:
            code = end.code
        finally:
            sys.argv, logging.root.handlers[:] = argv, handlers
            logging.root.setLevel(level)
            torch.use_deterministic_algorithms(deterministic)
            torch.utils.deterministic.fill_uninitialized_memory = fill
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `paths.runs` with one finished run."""
    runs = tmp_path_factory.mktemp("finished")
    done = command(train, *TINY, f"paths.runs={runs}")
    assert done.code == 0, done.err
    return runs


def run_folder(runs: Path) -> Path:
    """The only run folder below `runs`."""
    (config,) = runs.glob("*/*/config.yaml")
    return config.parent


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


COMPOSITION: dict[str, list[str]] = {
    "foo=1": ["foo is unknown; use one of", "quantizer"],
    "+foo=1": ["foo: ", "it takes name, seed"],
    "optimizer.lrr=1": ["optimizer.lrr is unknown; use one of", "lr,"],
    "+optimizer.lrr=1": ["optimizer.lrr: ", "it takes lr, momentum"],
    "callbacks=nothing": ["callbacks=nothing is unknown; use one of", "distillation,", "sam"],
    "callbacks=[sam,nothing]": ["callbacks=nothing is unknown; use one of", "distillation,", "sam"],
    "quantizer=nothing": ["quantizer=nothing is unknown; use one of", "lsq"],
    "experiment=nothing": ["experiment=nothing is unknown; use one of", "lsq_resnet20_cifar10_w4a4"],
    "nothing=lsq": ["nothing is unknown; use one of"],
    "a=[": ["a=[: ", "write key=value"],
    "seed=abc": ["seed='abc': use an integer"],
    "name=a/b": ["name='a/b' is not a folder name; use letters"],
    "compile=foo": ["compile=foo: use one of none, quantizers, network, auto"],
    "trainer.precision=16": ["trainer.precision=16: use 32 or bf16"],
    "~trainer.precision": ["trainer.precision=None: use 32 or bf16"],
    "~optimizer._target_": ["optimizer._target_='' is no dotted path; use package.module.Name"],
    "trainer.max_epochs=-3": ["trainer: `max_epochs` must be a non-negative integer or -1"],
    "finalise.weights=best": ["finalise.weights=best needs checkpoint.monitor; add checkpoint.monitor=val/accuracy"],
    "finalise.batchnorm_batches=99": ["finalise.batchnorm_batches=99: ", "use 1..4 batches of 35"],
    "trainer.accumulate_grad_batches=0": ["trainer.accumulate_grad_batches=0: use 1 or more"],
    "trainer.check_val_every_n_epoch=0": ["trainer.check_val_every_n_epoch=0: use 1 or more"],
    "model.width=0": ["model.width=0: use 1 channel or more"],
    "trainer.devices=-1": ["trainer: `devices` selected with `CPUAccelerator` should be an int > 0"],
    "model.in_channels=1": ["model.in_channels=1: the data has 3; leave it out or use that"],
    "data.batch_size=1000": ["data.batch_size=1000: no full batch in", "or less"],
    "model.num_classes=7": ["model.num_classes=7: the data has", "leave it out or use that"],
    "~quantizer": ["quantizer"],
    "optimizer.lr=fast": ["optimizer.lr='fast': use a number"],
    "optimizer.lr=-1": ["optimizer: Invalid learning rate: -1"],
    "calibration.batches=99": ["calibration.batches=99: ", "use 1..4 batches of 35"],
    "data.batch_size=": ["data.batch_size='': use an integer"],
    "quantizer.bits=-1": ["quantizer.bits=-1: use an integer from 1 to 8, or 32 for float"],
    "quantizer.bits=0": ["quantizer.bits=0: use an integer from 1 to 8, or 32 for float"],
    "quantizer.weight.narrow=maybe": ["quantizer.weight.narrow='maybe': use true or false"],
    "quantizer.bits=33": ["quantizer.bits=33: use an integer from 1 to 8, or 32 for float"],
    "quantizer.bits=2.5": ["quantizer.bits=2.5: use an integer from 1 to 8, or 32 for float"],
    "quantizer.rules=[{match: none, weight: {bits: 8}}]": ["quantizer.rules[0].match='none' matches no layer: use"],
    "quantizer.weight.name=foo": ["quantizer.*.name='foo' is unknown: use one of minmax, lsq"],
    "callbacks.sam.rho=1": ["callbacks.sam is not chosen; choose it with 'callbacks=[sam]'"],
    "quantizer.input.options.alpha=6": ["quantizer.input.options.alpha is unknown", "write +quantizer.input"],
    "optimizer.quantizer.lr_factor=-1": ["optimizer.quantizer.lr_factor=-1: use a number, 0 or more"],
    "+optimizer.quantizer.lr=0.1": ["optimizer.quantizer: lr and lr_factor", "~optimizer.quantizer.lr_factor"],
    "scheduler.final=-1": ["scheduler.final=-1: use 0 or more"],
    "quantizer.weight=[lsq]": ["quantizer.weight is of another kind", "write '~quantizer.weight' '+quantizer.weight="],
    "quantizer.table=nowhere.yaml": ["quantizer.table=nowhere.yaml: no such file; use the table.yaml"],
    "init_from=nowhere": ["init_from=nowhere: ", "give a file, a run folder, or paths.checkpoints"],
}  # fmt: skip


@pytest.mark.parametrize("override", COMPOSITION)
def test_a_wrong_override(override: str, tmp_path: Path) -> None:
    line = command(train, *TINY, f"paths.runs={tmp_path}", override).refusal()
    assert all(part in line for part in COMPOSITION[override]), line
    assert not list(tmp_path.glob("**/*.ckpt"))
    assert all((folder / "config.yaml").is_file() for folder in tmp_path.glob("*/*")), "no empty folder is left"


@pytest.mark.parametrize(
    ("file", "data", "says"),
    [
        (None, b"", "add data.download=true, or name their folder by paths.data=DIR or FLATBIT_DATA=DIR"),
        ("cifar-10-binary.tar.gz", b"no archive", "corrupt or incomplete); delete it and add data.download=true"),
        ("cifar10.npz", b"no archive", "cifar10.npz: corrupt, or no set of images (no zip archive); delete it"),
    ],
)
def test_missing_or_corrupt_data(file: str | None, data: bytes, says: str, tmp_path: Path) -> None:
    if file is not None:
        (tmp_path / file).write_bytes(data)
    options = [option for option in TINY if not option.startswith("data")]
    line = command(train, *options, "data=cifar10", f"paths.data={tmp_path}", f"paths.runs={tmp_path}/runs").refusal()
    assert says in line and not (tmp_path / "runs").exists()


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Arguments of a run that was stopped in its third epoch, with a checkpoint of each of the first two."""
    arguments = [*TINY, f"paths.runs={tmp_path}", *trouble(2 * STEPS_PER_EPOCH + 1, "stop")]
    monkeypatch.setattr(Trouble, "armed", True)
    assert command(train, *arguments).refusal() == "error: stopped"
    monkeypatch.setattr(Trouble, "armed", False)
    yield arguments


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def test_a_truncated_checkpoint_falls_back_to_the_previous_one(interrupted: list[str], tmp_path: Path) -> None:
    folder = RunFolder.existing(run_folder(tmp_path))
    truncate(folder.checkpoints / "last.ckpt")
    done = command(train, *interrupted)
    assert done.code == 0 and folder.finished
    assert f"last.ckpt is truncated: falling back to previous.ckpt (step {STEPS_PER_EPOCH})" in done.out
    assert load_checkpoint(folder.checkpoints / "last.ckpt")["global_step"] == 3 * STEPS_PER_EPOCH


def test_two_broken_checkpoints_are_left_as_they_are(interrupted: list[str], tmp_path: Path) -> None:
    folder = RunFolder.existing(run_folder(tmp_path)).checkpoints
    truncate(folder / "last.ckpt")
    truncate(folder / "previous.ckpt")
    before = contents(folder)
    line = command(train, *interrupted).refusal()
    assert "last.ckpt is truncated and previous.ckpt is truncated" in line
    assert f"delete {folder} to train from the start" in line
    assert contents(folder) == before


def test_a_full_disk_leaves_the_last_checkpoint(interrupted: list[str], tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    folder = RunFolder.existing(run_folder(tmp_path))
    last = folder.checkpoints / "last.ckpt"
    before = last.read_bytes()
    last.with_name("last.ckpt.tmp").symlink_to("/dev/full")
    line = command(train, *interrupted).refusal()
    assert f"paths.runs: cannot write in {folder.checkpoints} (No space left on device)" in line
    assert "set paths.runs to a folder with room" in line
    assert last.read_bytes() == before and not folder.finished
    assert command(train, *interrupted).code == 0 and folder.finished


@pytest.mark.parametrize("folder", ["a file/runs", "/proc/nothing"])
def test_a_runs_folder_that_cannot_be_written(folder: str, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    line = command(train, *TINY, f"paths.runs='{tmp_path / folder}'").refusal()
    assert f"paths.runs: cannot write in {tmp_path / folder}" in line and "set paths.runs to a folder with room" in line


def test_a_wandb_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    options = [option for option in TINY if not option.startswith("logger")]
    line = command(train, *options, f"paths.runs={tmp_path}/runs", f"logger.wandb.dir={tmp_path}/file").refusal()
    assert f"logger.wandb.dir: cannot write in {tmp_path}/file" in line
    assert (
        command(train, *TINY, f"paths.runs={tmp_path}/runs", "logger.wandb.mode=live")
        .refusal()
        .endswith("logger.wandb.mode=live: use one of offline, online, disabled")
    )


def test_a_loss_that_is_no_number_keeps_the_last_good_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trouble, "armed", True)
    line = command(train, *TINY, f"paths.runs={tmp_path}", *trouble(STEPS_PER_EPOCH + 1, "poison")).refusal()
    last = run_folder(tmp_path) / "checkpoints" / "last.ckpt"
    assert f"the loss is not finite at step {STEPS_PER_EPOCH + 1}; the last good state is kept in {last}" in line
    saved = load_checkpoint(last)
    assert saved["global_step"] == STEPS_PER_EPOCH
    assert all(bool(torch.isfinite(value).all()) for value in saved["state_dict"].values())


def test_a_learning_rate_that_explodes(tmp_path: Path) -> None:
    line = command(train, *TINY, f"paths.runs={tmp_path}", "optimizer.lr=1e20").refusal()
    assert "not finite at step " in line and "no checkpoint had been due before; try a smaller optimizer.lr" in line
    assert not list(tmp_path.glob("**/*.ckpt"))


def test_a_second_process_on_a_run_folder(interrupted: list[str], tmp_path: Path) -> None:
    folder = RunFolder.existing(run_folder(tmp_path))
    with folder.lock():
        before = contents(folder.path)
        line = command(train, *interrupted).refusal()
        assert contents(folder.path) == before
    assert f"run folder {folder.path} is in use by process {os.getpid()}; wait for it, or change seed" in line


def test_a_failed_job_of_a_multirun_does_not_end_the_others(tmp_path: Path) -> None:
    done = command(train, "-m", *TINY, f"paths.runs={tmp_path}", "trainer.max_epochs=1", "seed=abc,1")
    assert done.code == 2 and "Traceback" not in done.err
    assert done.err.splitlines()[-1] == "error: job 0 (seed=abc): seed='abc': use an integer"
    assert len(list(tmp_path.glob("**/summary.json"))) == 1
    refused = command(train, "-m", *TINY, f"paths.runs={tmp_path}/other", "model=resnet8,nothing")
    assert refused.refusal().startswith("error: model=nothing is unknown; use one of")
    assert not list((tmp_path / "other").glob("**/config.yaml"))  # found before the first job starts


@pytest.mark.parametrize("entry_point", [evaluate, export], ids=["evaluate", "export"])
class TestRunFolders:
    """What `run=DIR` may not be."""

    def test_no_run_folder(self, entry_point: Callable[[], None], tmp_path: Path) -> None:
        line = command(entry_point, f"run={tmp_path}").refusal()
        assert f"run={tmp_path}: not a run folder" in line and "give <paths.runs>/<experiment>/<hash>" in line
        assert command(entry_point, "run=null").refusal().startswith("error: run=None: not a run folder")
        assert command(entry_point).refusal() == "error: run is missing; add run=VALUE"
        assert "runn is unknown; use one of" in command(entry_point, f"runn={tmp_path}").refusal()

    @pytest.mark.parametrize("target", ["os.system", "torch.hub.load"])
    def test_a_config_that_names_what_it_may_not(
        self, target: str, entry_point: Callable[[], None], finished: Path, tmp_path: Path
    ) -> None:
        folder = Path(shutil.copytree(run_folder(finished), tmp_path / "run"))
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["data"]["_target_"] = target
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        before = contents(folder)
        line = command(entry_point, f"run={folder}").refusal()
        assert f"data._target_={target} is refused in a config of a run folder; allowed are" in line
        assert contents(folder) == before

    def test_an_unfinished_run(self, entry_point: Callable[[], None], finished: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(run_folder(finished), tmp_path / "run"))
        (folder / "summary.json").unlink()
        assert f"run={folder}: not finished" in command(entry_point, f"run={folder}").refusal()

    def test_a_corrupt_artifact(self, entry_point: Callable[[], None], finished: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(run_folder(finished), tmp_path / "run"))
        (weights,) = (folder / "artifact").glob("*.safetensors")
        content = np.frombuffer(weights.read_bytes(), np.uint8).copy()
        content[-1] ^= 1
        weights.write_bytes(content.tobytes())
        assert str(folder / "artifact") in command(entry_point, f"run={folder}").refusal()


def test_in_a_process_of_its_own(finished: Path) -> None:
    before = contents(finished)
    done = subprocess.run(
        [sys.executable, "-m", "research.train", *TINY, f"paths.runs={finished}", "quantizer.bits=33"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    assert outcome.refusal().startswith("error: quantizer.bits=33: use")
    assert {name: data for name, data in contents(finished).items() if name in before} == before
