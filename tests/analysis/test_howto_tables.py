"""The commands of docs/howto/tables.md run as they are written."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "docs/howto/tables.md").read_text(), flags=re.DOTALL)
    for line in block.splitlines()
]


def test_the_page_shows_every_script() -> None:
    assert {command.split()[2].partition(".")[2] for command in COMMANDS} == {"tables", "collect", "ablation", "report"}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_runs(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, module, *words = shlex.split(command)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module, *words])
    monkeypatch.delitem(sys.modules, module, raising=False)
    runpy.run_module(module, run_name="__main__")
    outputs = [word.partition("=")[2] for word in words if word.startswith("output=")]
    assert all((tmp_path / output).exists() for output in outputs)
    assert outputs or capsys.readouterr().out.startswith("| experiment |")
