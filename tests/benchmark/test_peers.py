"""Environments of peers: what is installed in which order, and why one is left out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.benchmark import peers
from analysis.benchmark.networks import Way, config_of
from analysis.benchmark.peer_worker import FLOAT, OURS, Request, measure


class Commands:
    """Stands in for processes; answers the question for torch's version."""

    def __init__(self, torch_version: str) -> None:
        self.torch_version, self.given = torch_version, []  # type: ignore[var-annotated]

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.given.append(command)
        return subprocess.CompletedProcess(command, 0, self.torch_version + "\n", "")


def test_torch_comes_first_and_every_install_pins_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands(torch.__version__)
    monkeypatch.setattr(subprocess, "run", commands)
    assert peers.interpreter("Brevitas", tmp_path) == str(tmp_path / "bin" / "python")
    pinned = f"torch=={torch.__version__.partition('+')[0]}"
    assert commands.given[0] == [sys.executable, "-m", "venv", str(tmp_path)]
    installs = [
        command[command.index("--disable-pip-version-check") + 1 :] for command in commands.given if "pip" in command
    ]
    assert installs[0] == [pinned]
    assert all(packages[0] == pinned for packages in installs)
    assert installs[-1][1:] == ["brevitas==0.13.4", "dependencies==2.0.1", "setuptools<81"]


def test_what_comes_with_torch_needs_no_environment(tmp_path: Path) -> None:
    assert peers.interpreter("torch.ao FakeQuantize", tmp_path / "none") == sys.executable
    assert not (tmp_path / "none").exists()


def test_a_peer_is_measured_beside_float_and_ours() -> None:
    recipe = config_of(Way(model="resnet8"))["quantizer"]
    name = "torch.ao _LearnableFakeQuantize"
    request = Request(name, recipe, "resnet8", 4, 2, 4, torch.get_num_threads(), "processor", "cpu")
    found = measure(request)
    assert {network: len(seconds) for network, seconds in found["seconds"].items()} == dict.fromkeys(
        [FLOAT, *OURS, name], 2
    )
    assert found["saved_bytes"][FLOAT] < found["saved_bytes"][name]
    assert found["form"] == "W4A4, scales learned"


def test_another_torch_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", Commands("1.0"))
    with pytest.raises(peers.Unavailable, match=r"has torch 1\.0, this process"):
        peers.environment_python(tmp_path)


def test_the_last_line_of_an_error_is_the_reason() -> None:
    with pytest.raises(peers.Unavailable, match="^ValueError: no wheel$"):
        peers.run([sys.executable, "-c", "raise ValueError('no wheel')"])


def test_an_unknown_peer_is_refused() -> None:
    with pytest.raises(ValueError, match="only=magic: use one of Brevitas, "):
        peers.measure(1, 1, "resnet8", 4, "cpu", "wall", only="magic")
