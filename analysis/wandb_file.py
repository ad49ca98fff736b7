"""Offline W&B runs: the records in a ``run-<id>.wandb`` file, read without W&B's server.

W&B writes protobuf records into a log of 32 KiB blocks, the log format of LevelDB
(https://github.com/google/leveldb/blob/main/doc/log_format.md) behind a 7-byte header of its own and with the plain
CRC-32 as checksum. W&B's Python package ships the record's definition and, since 0.31, no reader.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from research.runs.records import Metric

BLOCK = 32768
FILE_HEADER = struct.Struct("<4sHB")  # ident, magic number, version
MAGIC = (b":W&B", 0xBEE1, 0)
CHUNK_HEADER = struct.Struct("<IHB")  # checksum of type and data, length of data, type
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    """What one offline file says; a resumed run has one file for every start."""

    run: str = ""
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[Metric] = field(default_factory=list)


def payloads(data: bytes, path: Path) -> Iterator[bytes]:
    """The payloads of the log; a record that a kill cut off ends it.

    Args:
        data: the whole file.
        path: where it is, for messages.

    Raises:
        ValueError: no W&B file of this version, or a checksum that disagrees.
    """
    if len(data) < FILE_HEADER.size or FILE_HEADER.unpack_from(data) != MAGIC:
        raise ValueError(f"{path} is no W&B file of a known version: read the run folder instead")
    position, parts = FILE_HEADER.size, b""
    while position + CHUNK_HEADER.size <= len(data):
        room = BLOCK - position % BLOCK
        if room < CHUNK_HEADER.size:
            position += room
            continue
        checksum, length, kind = CHUNK_HEADER.unpack_from(data, position)
        start = position + CHUNK_HEADER.size
        chunk = data[start : start + length]
        if len(chunk) < length:
            return
        if zlib.crc32(bytes([kind]) + chunk) != checksum:
            raise ValueError(f"{path} is corrupt at byte {position}: read the run folder instead")
        position = start + length
        parts = chunk if kind in (FULL, FIRST) else parts + chunk
        if kind in (FULL, LAST):
            yield parts


def read_offline(path: Path) -> OfflineRun:
    """Configuration, history and summary in one ``.wandb`` file; history names as in ``metrics.csv``.

    Raises:
        ValueError: see `payloads`.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    found = OfflineRun()
    for payload in payloads(path.read_bytes(), path):
        record = Record.FromString(payload)
        if record.HasField("run"):
            found.run, found.name = record.run.run_id, record.run.display_name
            found.config |= _values(record.run.config.update)
        elif record.HasField("config"):
            found.config |= _values(record.config.update)
        elif record.HasField("history"):
            found.history += history_rows(_values(record.history.item))
        elif record.HasField("summary"):
            found.summary |= _values(record.summary.update)
    found.config.pop("_wandb", None)
    return found


def history_rows(logged: dict[str, Any]) -> list[Metric]:
    """One history row of W&B as rows of ``metrics.csv``: its numbers by name, at its optimizer step and epoch."""
    own = {name: value for name, value in logged.items() if not name.startswith("_") and _number(value)}
    step, epoch = int(own.pop("trainer/global_step", logged.get("_step", 0))), own.pop("epoch", None)
    return [Metric(step, None if epoch is None else int(epoch), name, float(value)) for name, value in own.items()]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _values(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
