"""Training configurations composed in this process, for what analysis trains itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from research.config import plain


def train_config(overrides: Sequence[str]) -> dict[str, Any]:
    """The plain config that ``python -m research.train`` would have with these overrides."""
    with initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        return plain(compose("train", overrides=list(overrides)))
