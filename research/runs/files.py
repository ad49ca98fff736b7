"""Atomic writes: a file of a run folder is the old one or the new one, never a torn one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def writing(folder: Path, key: str = "paths.runs") -> Iterator[None]:
    """Turn an operating system error (read-only, full, not a folder) into one line that names the config key."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"{key}: cannot write in {folder} ({reason}); set {key} to a folder with room") from error


def atomic_write_bytes(path: Path, data: bytes, previous: Path | None = None) -> None:
    """Replace `path` by `data`: temporary file beside it, fsync, rename, fsync of the folder.

    With `previous`, the file that stood at `path` is kept under that name; between the two renames only `previous`
    exists. Raises ValueError, naming `paths.runs`, where the folder cannot be written; `path` is then as before.
    """
    temporary = path.with_name(path.name + ".tmp")
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def atomic_write_text(path: Path, text: str) -> None:
    """Replace `path` by UTF-8 `text`, as `atomic_write_bytes` does."""
    atomic_write_bytes(path, text.encode())
