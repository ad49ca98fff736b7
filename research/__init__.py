"""flatbit: quantization-aware training research. `research.load(artifact)` gives a deployed network back."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn


def load(artifact: Path | str) -> nn.Module:
    """The deployed network in an artifact folder, in evaluation mode; see `research.deploy.artifact.load_artifact`."""
    from research.deploy.artifact import load_artifact

    return load_artifact(artifact)
