"""Every subcommand, on settings that take a moment: its record, and the page made of the records."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.benchmark import __main__ as command
from analysis.benchmark import compile, memory, page, peers, train
from analysis.benchmark.networks import REFERENCE, Way
from analysis.benchmark.peer_worker import OURS
from research.results import hardware
from research.runs.environment import snapshot

SMALL = ("rounds=1", "batch_size=4", "model=resnet8")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def measured(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *settings: str) -> dict[str, Any]:
    """What a subcommand records, after its section was found on the page."""
    monkeypatch.setattr(sys, "argv", ["benchmark", kind, f"output={tmp_path}", "threads=1", *settings])
    command.main()
    [path] = tmp_path.glob(f"*/{kind}.json")
    record: dict[str, Any] = json.loads(path.read_text())
    text = page.page(tmp_path)
    assert f"## {page.SECTIONS[kind][0]}\n" in text
    assert record["hardware"] in text and f"torch {torch.__version__}" in text
    values: dict[str, Any] = record["values"]
    return values


def test_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "GROUPS", {"eager": (Way(bits=32), Way(), Way(recompute=True))})
    found = measured("train", tmp_path, monkeypatch, *SMALL, "only=eager")["eager"]
    assert list(found) == ["float, eager", "W4A4 LSQ, eager", "W4A4 LSQ, eager, recomputed"]
    assert found["float, eager"]["ratio"] == 1.0 < found["W4A4 LSQ, eager"]["ratio"]


def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "WAYS", (Way(bits=32), Way(), Way(recompute=True), Way(execution=REFERENCE)))
    monkeypatch.setattr(memory, "peak_bytes", lambda way, batch_size: 2**20)
    found = measured("memory", tmp_path, monkeypatch, *SMALL[1:])
    kept = {name: cell["ratio"] for name, cell in found.items()}
    assert kept["W4A4 LSQ, eager, recomputed"] < kept["float, eager"] < kept["W4A4 LSQ, eager, detach form"]


def test_a_process_of_its_own_tells_its_peak() -> None:
    assert memory.peak_bytes(Way(bits=32, model="resnet8"), 2) > 100 * 2**20


def test_compile_shares_its_cache_between_the_two_starts_of_one_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    other = subprocess.run

    def run(command: list[str], env: dict[str, str] | None = None, **options: Any) -> Any:
        if env is None:
            return other(command, **options)
        return started.append((command[-1], env["TORCHINDUCTOR_CACHE_DIR"]))

    monkeypatch.setattr(subprocess, "run", run)
    found = measured("compile", tmp_path, monkeypatch, *SMALL[1:])
    assert list(found) == [way.name for way in compile.WAYS]
    assert started[0::2] == started[1::2]
    assert len(set(started)) == len(compile.WAYS)


def test_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured("data", tmp_path, monkeypatch, "rounds=1", "images=512")
    assert found["flatbit"]["ratio"] > 1.0


def test_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured("lightning", tmp_path, monkeypatch, "rounds=1", "batches=25")
    assert list(found) == ["loop by hand", "Fabric", "plain LightningModule", "flatbit"]
    hand = found["loop by hand"]["us"]
    assert hand > 0
    for loop in found.values():
        assert loop["us"] > 0 and loop["above_us"] == pytest.approx(loop["us"] - hand)


def test_curvature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("rounds=5", "clock=processor", *SMALL[1:], "images=8")  # a ratio of times on a machine that may be busy
    found = measured("curvature", tmp_path, monkeypatch, *settings)
    assert list(found) == ["float", "W4A4 LSQ"]
    for ways in found.values():
        assert ways["double backward by hand"]["ratio"] == 1.0
        assert ways["surface=quantized, graphs kept"]["ratio"] < 1.0


def test_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(folder: Path) -> str:
        raise peers.Unavailable("no package index")

    monkeypatch.setattr(peers, "environment_python", unreachable)
    monkeypatch.delitem(peers.PEERS, "torch.ao _LearnableFakeQuantize")
    found = measured("peers", tmp_path, monkeypatch, *SMALL, f"folder={tmp_path}")
    observed = found["measured"]["torch.ao FakeQuantize"]
    assert observed["version"] == torch.__version__
    assert list(observed["networks"]) == ["float", *OURS, "torch.ao FakeQuantize"]
    assert observed["networks"]["torch.ao FakeQuantize"]["saved_ratio"] > 1.4
    assert found["skipped"] == {"Brevitas": "no package index", "torchao PT2E": "no package index"}
    assert "Brevitas was not measured: no package index." in page.page(tmp_path)


def test_an_unknown_subcommand_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "speed"])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert "error: speed to measure: use one of train, " in capsys.readouterr().err


def test_a_page_shows_every_machine(tmp_path: Path) -> None:
    for machine in ("AMD EPYC, 2 cores, AVX2", "Intel(R) Xeon(R) Processor, 2 cores"):
        record = {
            "hardware": machine,
            "torch": "2",
            "settings": {},
            "values": {"flatbit": {"images_per_second": 1.0, "ratio": 1.0}},
        }
        folder = tmp_path / command.folder_of(machine)
        folder.mkdir()
        (folder / "data.json").write_text(json.dumps(record))
    assert {path.name for path in tmp_path.iterdir()} == {"amd_epyc_2_cores_avx2", "intel_xeon_processor_2_cores"}
    text = page.page(tmp_path)
    assert text.count("## Data path") == 1
    assert text.index("AMD EPYC, 2 cores, AVX2, torch 2") < text.index("Intel(R) Xeon(R) Processor, 2 cores, torch 2")


def test_a_page_needs_a_record(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no record there; make some"):
        page.page(tmp_path)


def test_the_howto_names_every_subcommand() -> None:
    text = Path("docs/howto/benchmark.md").read_text()
    kinds = {*command.MEASURES, "page"}
    assert set(re.findall(r"^python -m analysis.benchmark (\w+)$", text, flags=re.MULTILINE)) == kinds
    assert set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)) == kinds


def test_a_cpu_is_named_with_its_instructions() -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    assert re.search(rf"\d+ cores, {capability}( bf16)?$", hardware(snapshot(), "cpu"))
