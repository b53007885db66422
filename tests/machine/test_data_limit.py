"""A data limit turns an overrun into an error that is recognised, and is gone afterwards."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
import textwrap

import pytest
import torch

from narrowboat.errors import TrainingError, UsageError
from narrowboat.machine.data_limit import data_limit, is_out_of_memory

HEAD = """
import resource, sys
from narrowboat.machine.data_limit import data_limit, is_out_of_memory
MIB = 1 << 20
def limit():
    return resource.getrlimit(resource.RLIMIT_DATA)
"""


def child(code: str) -> str:
    """What ``code`` prints in a process of its own; ``no limit: why`` skips the test."""
    done = subprocess.run(
        [sys.executable, "-c", HEAD + textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr}"
    if done.stdout.startswith("no limit:"):
        pytest.skip(done.stdout.strip())
    return done.stdout.strip()


def test_an_overrun_is_caught_and_the_process_lives_on_without_the_limit() -> None:
    code = """
    import torch
    before = limit()
    try:
        with data_limit(64 * MIB) as reason:
            if reason:
                print("no limit:", reason)
                sys.exit()
            kept = torch.ones(8 * MIB // 4)
            torch.ones(256 * MIB // 4)
    except RuntimeError as error:
        print(is_out_of_memory(error), limit() == before, torch.ones(256 * MIB // 4).sum().item() == 64 * MIB)
    """
    assert child(code) == "True True True"


def test_a_step_that_runs_out_can_be_repeated_without_the_limit() -> None:
    code = """
    import torch
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3))
    x = torch.randn(8, 3, 96, 96)
    try:
        with data_limit(4 * MIB) as reason:
            if reason:
                print("no limit:", reason)
                sys.exit()
            net(x).sum().backward()
        print("it fitted")
    except RuntimeError as error:
        print(is_out_of_memory(error))
    net.zero_grad()
    net(x).sum().backward()
    print(all(p.grad is not None for p in net.parameters()))
    """
    assert child(code).split() == ["True", "True"]


def test_python_memory_errors_are_recognised() -> None:
    code = """
    try:
        with data_limit(16 * MIB) as reason:
            if reason:
                print("no limit:", reason)
                sys.exit()
            bytearray(256 * MIB)
    except MemoryError as error:
        print(is_out_of_memory(error))
    """
    assert child(code) == "True"


def test_blocks_nest_and_an_inner_one_is_never_wider() -> None:
    code = """
    before = limit()
    with data_limit(128 * MIB) as reason:
        if reason:
            print("no limit:", reason)
            sys.exit()
        outer = limit()
        with data_limit(32 * MIB):
            inner = limit()
        with data_limit(1024 * MIB):
            wide = limit()
        back = limit()
    print(inner[0] < outer[0], wide == outer, back == outer, outer[1] == before[1], limit() == before)
    """
    assert child(code) == "True True True True True"


def test_the_hard_limit_is_kept_to() -> None:
    code = """
    from narrowboat.machine.memory import process_memory
    hard = process_memory().data + 64 * MIB
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    with data_limit(1024 * MIB) as reason:
        if reason:
            print("no limit:", reason)
            sys.exit()
        print(limit() == (hard, hard))
    """
    assert child(code) == "True"


def test_a_kernel_that_refuses_gives_its_reason_and_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kind: int, limits: tuple[int, int]) -> None:
        raise PermissionError(errno.EPERM, "not here")

    before = resource.getrlimit(resource.RLIMIT_DATA)
    monkeypatch.setattr(resource, "setrlimit", refuse)
    with data_limit(1 << 30) as reason:
        assert "not here" in reason
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_a_negative_limit_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="0 or more"), data_limit(-1):
        pass


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: ..."),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("could not create a memory object"),
        RuntimeError("could not execute a primitive"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:48],
)
def test_these_say_that_memory_ran_out(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        ValueError("out of memory of the events"),
        OSError(errno.ENOSPC, "No space left on device"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_these_do_not(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_the_cause_counts() -> None:
    try:
        try:
            raise MemoryError
        except MemoryError as cause:
            raise TrainingError("the step failed") from cause
    except TrainingError as error:
        assert is_out_of_memory(error)
