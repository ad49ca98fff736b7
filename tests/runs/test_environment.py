import getpass
import json
import os
import platform
import subprocess
from datetime import datetime
from pathlib import Path

import torch

from research.runs.environment import snapshot, source_revision


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


def test_snapshot_names_versions_and_nothing_private() -> None:
    record = snapshot()
    assert record["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["python"] == platform.python_version() and record["threads"] == torch.get_num_threads()
    assert record["cpu_instructions"].removesuffix(" bf16") == torch.backends.cpu.get_cpu_capability()
    assert datetime.fromisoformat(record["time"]).utcoffset().total_seconds() == 0
    values = json.dumps({key: value for key, value in record.items() if key != "git"})
    assert os.getcwd() not in values and str(Path.home()) not in values.split('"')
    assert platform.node() not in values.split('"') and getpass.getuser() not in values.split('"')


def test_revision_is_of_the_own_checkout_only(tmp_path: Path) -> None:
    inner = tmp_path / "site-packages"
    inner.mkdir()
    assert source_revision(tmp_path) is None
    git(tmp_path, "init")
    assert source_revision(tmp_path) is None
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "one")
    clean = source_revision(tmp_path)
    assert clean is not None and len(clean["commit"]) == 40 and not clean["dirty"]
    (tmp_path / "file").write_text("2")
    assert source_revision(tmp_path) == {"commit": clean["commit"], "dirty": True}
    assert source_revision(inner) is None
