"""Distributions of values and codes: by hand on single tensors, and of a small network in a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from analysis.distributions import BIN, KIND, density, distribution_of, distributions, histogram, layer_distributions
from analysis.figures.n2uq_thresholds import staircase
from research.deploy import save_artifact
from research.quant.quantizers import Quantizer, QuantizerSpec
from research.quant.quantizers.lq_nets import LQNets
from research.quant.quantizers.lsq import LSQ
from research.quant.quantizers.n2uq import N2UQ
from research.results import save_weights
from research.runs.folder import RunFolder
from tests.deploy.conftest import make


def test_a_histogram_has_a_border_at_zero_and_sums_to_one() -> None:
    kept = histogram(torch.tensor([-0.01, 0.01, 0.02, 1.26, 99.0]))
    assert kept["start"] == -BIN and kept["share"][:2] == [0.2, 0.4]
    assert sum(kept["share"]) == pytest.approx(1) and kept["share"][-1] == 0.2  # what lies beyond is in the last bin
    edges, dense = density(kept, merge=2)
    assert edges[1] - edges[0] == pytest.approx(2 * BIN)
    assert sum(dense) * 2 * BIN == pytest.approx(1)
    assert dense[0] * 2 * BIN == pytest.approx(0.6)


def lsq(bits: int, scale: float) -> Quantizer:
    quantizer = LSQ(QuantizerSpec("lsq", bits), (4,), None, "weight")
    quantizer.raw_scale.data.fill_(scale)
    return quantizer


def test_codes_levels_and_error_of_a_uniform_quantizer() -> None:
    values = torch.tensor([1.0, -1.0, 0.4, -2.0])
    with torch.no_grad():
        found = distribution_of(values, lsq(2, 1.0))
    rms = float(values.square().mean().sqrt())
    assert (found["codes"], found["share"]) == ([-2, -1, 0, 1], [0.25, 0.25, 0.25, 0.25])
    assert found["levels"] == pytest.approx([code / rms for code in (-2, -1, 0, 1)], rel=1e-3)
    assert found["error"] == pytest.approx(0.4**2 / 4 / rms**2)
    assert found["rms"] == pytest.approx(rms)


def test_wide_quantizers_keep_no_codes() -> None:
    with torch.no_grad():
        found = distribution_of(torch.randn(4), lsq(8, 0.01))
    assert "codes" not in found and found["bits"] == 8 and found["error"] > 0


def test_float_tensors_have_a_histogram_and_the_kurtosis() -> None:
    found = distribution_of(torch.linspace(-1, 1, 2001), None)
    assert set(found) == {"rms", "kurtosis", "histogram"}
    assert found["kurtosis"] == pytest.approx(1.8, abs=1e-3)


def test_levels_per_channel_are_in_units_of_the_channel() -> None:
    spec = QuantizerSpec("lq_nets", 2, granularity="channel")
    values = torch.tensor([[1.0, -1.0, 1.0, -1.0], [10.0, -10.0, 10.0, -10.0]])
    quantizer = LQNets(spec, values.shape, 0, "weight")
    quantizer.basis.copy_(torch.tensor([[0.25, 0.75], [2.5, 7.5]]))
    with torch.no_grad():
        found = distribution_of(values, quantizer)
    assert found["levels"] == pytest.approx([-1, -0.5, 0.5, 1])
    assert found["share"] == [0.5, 0, 0, 0.5] and found["error"] == 0


def test_learned_thresholds_are_in_units_of_the_input() -> None:
    quantizer = N2UQ(QuantizerSpec("n2uq", 2), (), None, "input")
    assert quantizer.a is not None and quantizer.scale1 is not None
    quantizer.a.data.copy_(torch.tensor([0.2, 0.4, 1.4]))
    quantizer.scale1.data.fill_(2.0)
    values = torch.tensor([0.0, 2.0])
    with torch.no_grad():
        found = distribution_of(values, quantizer)
        thresholds = torch.tensor(found["thresholds"]) * found["rms"]
        below, above = quantizer.codes(thresholds - 1e-3), quantizer.codes(thresholds + 1e-3)
    assert thresholds.tolist() == pytest.approx([0.05, 0.2, 0.65], rel=1e-3)
    assert (above - below).tolist() == [1, 1, 1]
    assert staircase([0.5, 1.0], [0, 1, 2]) == ([0.0, 0.5, 0.5, 1.0, 1.0, 4.0], [0, 0, 1, 1, 2, 2])


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunFolder, Tensor]:
    """A folder with the artifact and the weights of a small network, and images."""
    slot = {"name": "lsq", "bits": 2, "granularity": "tensor", "options": {}}
    net, model, images = make("resnet8", {"weight": slot, "input": slot}, width=4)
    (tmp_path / "config.yaml").write_text("name: small\n")
    folder = RunFolder.existing(tmp_path)
    save_artifact(net, model, folder.artifact)
    save_weights(net, folder.final)
    return folder, images


def test_every_layer_of_a_run(run: tuple[RunFolder, Tensor]) -> None:
    folder, images = run
    found = layer_distributions(folder, "final", images)
    assert set(found) == {"conv1", "fc", *(f"layer{i}.0.conv{j}" for i in (1, 2, 3) for j in (1, 2))}
    assert found["conv1"]["weight"]["bits"] == 8 and "codes" not in found["conv1"]["weight"]
    inner = found["layer2.0.conv1"]
    assert inner["weight"]["codes"] == [-2, -1, 0, 1] and inner["input"]["codes"] == [0, 1, 2, 3]
    for slots in found.values():
        assert all(sum(data["histogram"]["share"]) == pytest.approx(1, abs=2e-3) for data in slots.values())


def test_without_weights_only_the_record_tells(run: tuple[RunFolder, Tensor]) -> None:
    folder, _ = run
    folder.final.unlink()

    class Kept:
        measurements = [{"kind": KIND, "settings": {"deployment": "final"}, "values": {"conv1": {}}}]

    row: dict[str, Any] = {"path": folder.path, "name": "final", "run": Kept()}
    assert distributions(row) == {"conv1": {}}
    assert distributions({**row, "name": "another"}) is None
