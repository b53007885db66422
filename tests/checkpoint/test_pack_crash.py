"""Whatever stops pack leaves nothing that could be mistaken for a model."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from narrowboat.checkpoint import open_index, pack
from narrowboat.errors import StorageError

TENSORS = {"a": torch.ones(3 * 2**20), "b": torch.ones(5)}

PACK_AND_HANG = """
import sys, time, torch
from narrowboat.checkpoint import pack
def hang(done, total):
    print(done, flush=True)
    time.sleep(600)
pack({"a": torch.ones(6 * 2**20), "b": torch.ones(5)}, sys.argv[1], progress=hang)
"""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["pwrite", "fdatasync", "fsync", "replace"])
def test_failing_storage_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    real, calls = getattr(os, call), 0

    def fail(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls < 2 and call == "pwrite":  # fail in the middle
            return real(*args)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StorageError, match=os.strerror(number)):
            pack(TENSORS, tmp_path / "m.safetensors")
    assert os.listdir(tmp_path) == []


def test_failing_storage_keeps_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    pack({"old": torch.ones(2)}, path)

    def fail(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(StorageError):
            pack(TENSORS, path, overwrite=True)
    assert os.listdir(tmp_path) == ["m.safetensors"]
    assert list(open_index(path).entries) == ["old"]


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, bytes(data[:100_001]), offset))
        pack(TENSORS, tmp_path / "m.safetensors")
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "m.safetensors")["a"], TENSORS["a"])


def test_too_little_space_is_told_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = os.statvfs(tmp_path)
    full = os.statvfs_result((*space[:3], 0, 0, *space[5:]))
    monkeypatch.setattr(os, "fstatvfs", lambda descriptor: full)
    with pytest.raises(StorageError, match=r"needs 12\.0 MiB, 0 B are free"):
        pack(TENSORS, tmp_path / "m.safetensors")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interruption_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def stop(done: int, total: int) -> None:
        raise error

    with pytest.raises(error):
        pack(TENSORS, tmp_path / "m.safetensors", progress=stop)
    assert os.listdir(tmp_path) == []


def test_kill_leaves_no_model_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    child = subprocess.Popen([sys.executable, "-c", PACK_AND_HANG, str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline()  # the child is in the middle of the first tensor
    with pytest.raises(StorageError, match="another process is writing"):
        pack(TENSORS, path)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert list(tmp_path.glob("*.safetensors")) == []
    assert len(os.listdir(tmp_path)) == 1  # the temporary file
    pack(TENSORS, path)
    assert os.listdir(tmp_path) == ["m.safetensors"]
    assert open_index(path).packed
