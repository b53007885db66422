"""The real bindings, called as the arena calls them, over a driver in C that checks what it is given."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
MIB = 1 << 20


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("cuda.bindings.driver")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    made = tmp_path_factory.mktemp("fake") / "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libcuda.so.1", "-o", str(made)]
    subprocess.run([*command, str(HERE / "fake_libcuda.c"), "-ldl"], check=True)
    return made


@pytest.fixture
def run(library: Path, tmp_path: Path) -> Any:
    def run(*what: str, **settings: Any) -> tuple[dict[str, Any], list[str]]:
        log = tmp_path / "log"
        log.write_text("")
        environment = {
            **os.environ,
            **{name: str(value) for name, value in settings.items()},
            "LD_LIBRARY_PATH": f"{library.parent}:{os.environ.get('LD_LIBRARY_PATH', '')}",
            "FAKE_LOG": str(log),
        }
        command = [sys.executable, str(HERE / "fake_life.py"), *what]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return json.loads(done.stdout), log.read_text().splitlines()

    return run


def test_a_whole_life(run: Any) -> None:
    told, log = run("live")
    assert "raised" not in told
    assert (told["granularity"], told["unified"], told["in place"]) == (2 * MIB, False, True)
    assert (told["free at first"], told["free with a slab"]) == (64 * MIB, 56 * MIB)
    # Seven MiB of four chunks are mirrored, and the eighth is held: three chunks can go.
    assert told["free after evicting"] == [58 * MIB, 62 * MIB]
    assert told["restore"].startswith("2.00 MiB of 6.00 MiB are still to come back")
    assert told["out"] == 2 * MIB
    assert told["right"] == [True, True]
    assert "already" in told["pin"].lower()
    assert told["free in the end"] == 64 * MIB
    assert (told["pinned in the end"], told["current context in the end"]) == (0, 0)
    for counted in ("create", "map", "access", "unmap", "release"):
        calls = [line for line in log if line.split()[0] == counted]
        assert len(calls) == len([line for line in log if line.split()[0] == "create"]), counted
    assert len([line for line in log if line.startswith("reserve")]) == 2
    assert len([line for line in log if line.startswith("free")]) == 2
    assert len([line for line in log if line.startswith("register")]) == len(
        [line for line in log if line.startswith("unregister")]
    )
    # The default stream is PyTorch's, by its name; copies of the mirror have a stream of their own.
    assert f"cuMemcpyHtoDAsync {8 * MIB} on -1" in log
    assert "cuMemcpyDtoDAsync 1000 on -1" in log
    assert f"cuMemcpyDtoHAsync {2 * MIB} on 1" in log
    assert log.count("destroy 1") == 1


def test_pytorchs_default_stream_is_meant_even_if_the_bindings_have_another(run: Any) -> None:
    told, log = run("live", CUDA_PYTHON_CUDA_PER_THREAD_DEFAULT_STREAM=1)
    assert told["right"] == [True, True]
    assert "cuMemcpyDtoDAsync 1000 on -1" in log


def test_a_failure_in_the_middle_gives_everything_back(run: Any) -> None:
    told, _ = run("fail")
    assert len(told) == 12
    for wish, (message, kept, held_then) in told.items():
        kind = "DeviceMemoryError" if wish.endswith(":2") else "DeviceError"
        assert message.startswith(f"{kind}: cannot have 2.00 MiB more of device memory: CUDA_ERROR_"), wish
        assert (kept, held_then) == (0, 8 * MIB), wish


WRONG = {
    "FAKE_VERSION=10020": "DriverTooOldError: the driver supports CUDA 10.2",
    "FAKE_VMM=0": "DriverTooOldError: cuda:0 or its driver (CUDA 13.0) has no virtual memory management",
    "FAKE_FAIL=cuInit:1:100": "NoDeviceError: cannot start the CUDA driver: CUDA_ERROR_NO_DEVICE",
    "FAKE_FAIL=cuInit:1:803": "DriverTooOldError: cannot start the CUDA driver: CUDA_ERROR_SYSTEM_DRIVER",
    "FAKE_FAIL=cuInit:1:4444": "DeviceError: cannot start the CUDA driver",
    "FAKE_FAIL=cuDevicePrimaryCtxRetain:1:2": "DeviceMemoryError: cannot use cuda:0",
    "FAKE_FAIL=cuMemGetInfo:1:700": "DeviceLostError: cannot ask for free memory",
    "FAKE_FAIL=cuStreamCreate:1:2": "DeviceMemoryError: cannot create a stream",
}


def test_what_goes_wrong_has_a_name(run: Any) -> None:
    told, _ = run("wrong", *WRONG)
    assert list(told) == list(WRONG)
    for setting, begin in WRONG.items():
        assert told[setting].startswith(begin), setting


def test_leaving_with_everything_open_is_silent(run: Any) -> None:
    told, log = run("leave")
    assert told == {}
    assert not any(line.startswith("unmap 2097152 at 6291456") for line in log)
