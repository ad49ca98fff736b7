"""Files from the official source of a data set: verified by checksum, in place only when complete."""

from __future__ import annotations

import hashlib
import os
import urllib.request
from pathlib import Path


def verify_checksum(path: Path, algorithm: str, expected: str, remedy: str) -> None:
    """Raise `ValueError`, ending in `remedy`, unless the file's digest (`md5`, `sha256`, ...) is `expected`."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found != expected:
        raise ValueError(f"{path}: {algorithm} is {found}, not {expected} (corrupt or incomplete); {remedy}")


def download(url: str, target: Path, md5: str) -> None:
    """Fetch `url` to `target` by way of a temporary file beside it, which is verified before it takes the name."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url) as response, partial.open("wb") as file:
            while chunk := response.read(1 << 20):
                file.write(chunk)
        verify_checksum(partial, "md5", md5, "try the download again")
        partial.replace(target)
    except OSError as error:
        raise ValueError(
            f"data.download=true: could not fetch {url} ({error}); put {target.name} into {target.parent} by hand"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
