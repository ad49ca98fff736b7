import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from research.runs.files import atomic_write_bytes, atomic_write_text
from research.runs.folder import NOT_IDENTITY, RunFolder, config_hash
from research.runs.records import read_config, write_config, write_summary

CONFIG = {"seed": 1, "optimizer": {"lr": 1e-05, "nesterov": True}, "data": {"name": "1e-4", "parts": [1, None, 0.1]}}


def test_hash_depends_on_what_is_computed_and_only_on_that() -> None:
    reordered = dict(reversed(CONFIG.items()))
    display = {key: {"anything": 1} for key in NOT_IDENTITY}
    assert config_hash(reordered) == config_hash(CONFIG) == config_hash({**CONFIG, **display})
    assert config_hash({**CONFIG, "seed": 2}) != config_hash(CONFIG)
    shown, hidden = ({"trainer": {"max_epochs": 1, "enable_progress_bar": bar}} for bar in (True, False))
    assert config_hash(shown) == config_hash(hidden) != config_hash({"trainer": {"max_epochs": 2}})


def test_the_hash_is_stable_across_releases() -> None:
    assert config_hash({"seed": 1, "quantizer": {"bits": 4}}) == "25545e46ce"


def test_same_config_same_folder_and_existing_finds_it_even_when_renamed(tmp_path: Path) -> None:
    folder = RunFolder.of(tmp_path, "lsq_w4a4", CONFIG)
    assert folder == RunFolder.of(tmp_path, "lsq_w4a4", CONFIG)
    assert folder.path == tmp_path / "lsq_w4a4" / config_hash(CONFIG) and not folder.path.exists()
    write_config(folder.config_path, CONFIG)
    assert read_config(folder.config_path) == CONFIG
    assert RunFolder.existing(folder.path) == folder
    moved = folder.path.rename(folder.path.with_name("kept"))
    assert RunFolder.existing(moved).hash == folder.hash


def test_existing_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^run=.*no config.yaml.*the path that training printed$"):
        RunFolder.existing(tmp_path)


def test_experiment_must_be_a_folder_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name='../x'"):
        RunFolder.of(tmp_path, "../x", CONFIG)


def test_finished_needs_a_valid_summary_of_this_very_config(tmp_path: Path) -> None:
    folder = RunFolder.of(tmp_path, "mini", CONFIG)
    assert not folder.finished
    write_summary(folder, 1, [{"name": "last", "accuracy": 0.5}])
    assert folder.finished
    assert not RunFolder(folder.path, "mini", "0" * 10).finished
    whole = folder.summary_path.read_text()
    folder.summary_path.write_text(whole[:-5])
    assert not folder.finished


def test_a_root_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where a folder should be")
    folder = RunFolder.of(tmp_path / "runs", "mini", CONFIG)
    with pytest.raises(ValueError, match=r"^paths.runs: cannot write in .*Not a directory.*$"), folder.lock():
        pass


def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "record"
    atomic_write_text(path, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"^paths.runs: cannot write in .*\(" + os.strerror(errno.EFBIG)):
            atomic_write_bytes(path, bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_second_process_is_told_who_holds_the_folder_and_a_kill_frees_it(tmp_path: Path) -> None:
    folder = RunFolder.of(tmp_path, "mini", CONFIG)
    script = (
        "import time; from research.runs.folder import RunFolder\n"
        f"with RunFolder.of({str(tmp_path)!r}, 'mini', {CONFIG!r}).lock(): print('held', flush=True); time.sleep(60)"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=root) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"in use by process {other.pid};"), folder.lock():
            pass
        other.kill()
        other.wait()
    for _ in range(2):
        with folder.lock():
            assert (folder.path / ".lock").read_text() == f"{os.getpid()}\n"
