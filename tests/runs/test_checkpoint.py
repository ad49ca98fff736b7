import os
from pathlib import Path
from typing import Any

import pytest
import torch

from research.runs import files
from research.runs.checkpoint import RunCheckpoint, VerifiedCheckpointIO, damage, load_checkpoint, load_newest


def state(step: int) -> dict[str, Any]:
    return {"global_step": step, "state_dict": {"w": torch.full((100,), float(step))}, "note": ("a", [1, None])}


def save(folder: Path, step: int, name: str = "last.ckpt") -> None:
    VerifiedCheckpointIO().save_checkpoint(state(step), folder / name)


def step_of(path: Path | None) -> int:
    assert path is not None
    return int(load_checkpoint(path)["global_step"])


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_last_and_previous_are_plain_torch_files(tmp_path: Path) -> None:
    assert load_newest(tmp_path) is None
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert step_of(load_newest(tmp_path)) == 3 and step_of(tmp_path / "previous.ckpt") == 2
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["note"] == ("a", [1, None])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]


@pytest.mark.parametrize("left", [0, 10, 700, -1])
def test_a_truncated_last_falls_back_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture, left: int) -> None:
    save(tmp_path, 7), save(tmp_path, 8)
    last = tmp_path / "last.ckpt"
    last.write_bytes(last.read_bytes()[:left])
    assert load_newest(tmp_path) == tmp_path / "previous.ckpt"
    assert caplog.messages == ["last.ckpt is truncated: falling back to previous.ckpt (step 7)"]
    save(tmp_path, 9)
    assert step_of(tmp_path / "previous.ckpt") == 7, "a damaged last.ckpt must not replace the valid previous one"


def test_a_flipped_bit_in_the_weights_is_found(tmp_path: Path) -> None:
    save(tmp_path, 5)
    last = tmp_path / "last.ckpt"
    weights = last.read_bytes().index(torch.full((100,), 5.0).numpy().tobytes())
    flip(last, weights + 200)
    assert damage(last) == "corrupt"
    with pytest.raises(ValueError, match=r"^checkpoint .*last.ckpt is corrupt; use .*$"):
        VerifiedCheckpointIO().load_checkpoint(last)


def test_nothing_valid_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    save(tmp_path, 1), save(tmp_path, 2)
    for name in ("last.ckpt", "previous.ckpt"):
        (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"last.ckpt is truncated and previous.ckpt is truncated.*delete"):
        load_newest(tmp_path)


def test_a_kill_at_any_moment_of_a_save_leaves_a_valid_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    calls = 0

    def die(patch: pytest.MonkeyPatch, name: str, at: int) -> None:
        original = getattr(os, name)

        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise Killed
            return original(*arguments)

        patch.setattr(files.os, name, call)

    kept = []
    for at in range(1, 5):  # fsync of the file, rename to previous, rename to last, fsync of the folder
        folder = tmp_path / str(at)
        save(folder, 1), save(folder, 2)
        calls = 0
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die(patch, "fsync", at), die(patch, "replace", at)
            save(folder, 3)
        kept.append(step_of(load_newest(folder)))
        save(folder, 4)
        assert step_of(load_newest(folder)) == 4
    assert kept == [2, 2, 2, 3] and calls == 4


def test_unrestricted_pickle_is_neither_written_nor_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"plain containers and tensors in state_dict\(\).*PosixPath"):
        VerifiedCheckpointIO().save_checkpoint({"callbacks": {"path": tmp_path}}, tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"function": os.system}, foreign)
    with pytest.raises(ValueError, match="is refused"):
        VerifiedCheckpointIO().load_checkpoint(foreign, weights_only=False)
    with pytest.raises(ValueError, match="does not exist"):
        load_checkpoint(tmp_path / "absent.ckpt")


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="^paths.runs: .*No space left on device"):
        patch.setattr(files.os, "fsync", full)
        save(tmp_path, 2)
    assert step_of(load_newest(tmp_path)) == 1 and [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"every_n_steps": 0}, "checkpoint.every_n_steps=0"), ({"mode": "best"}, "checkpoint.mode=best")],
)
def test_bad_options_name_their_key(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunCheckpoint(tmp_path, **options)
