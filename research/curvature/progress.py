"""Progress bars of long measurements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(steps: Sequence[T], label: str) -> Iterable[T]:
    """``steps``, with a bar on standard error that says ``label``; without one where that is no terminal."""
    bar: Iterable[T] = tqdm(steps, desc=label, leave=False, disable=None)
    return bar
