"""Holes that an earlier policy left in the heap are not filled again by tensors; in a child process each."""

from __future__ import annotations

import subprocess
import sys

import pytest

from narrowboat.machine.malloc import MallocPolicy, allocator_name

needs_glibc = pytest.mark.skipif(
    allocator_name() != "glibc", reason=f"the allocator is {allocator_name()}, not glibc's"
)

# A heap full of holes of 200 KiB, given back; then blocks of 100 KiB come and go. What stays of them?
SCRIPT = """
import ctypes, sys
from narrowboat.machine.malloc import set_malloc_policy, trim
from narrowboat.machine.memory import process_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
set_malloc_policy("default")
libc.mallopt(-3, 32 << 20)
made = [(libc.malloc(200 << 10), libc.malloc(20 << 10)) for _ in range(200)]
for large, _ in made:
    ctypes.memset(large, 1, 200 << 10)
for large, _ in made:
    libc.free(large)
if sys.argv[1] == "holes left open":
    libc.mallopt(-3, 64 << 10)
    libc.malloc_trim(0)
else:
    for policy in sys.argv[1:]:
        set_malloc_policy(policy)
before = process_memory().anon
blocks = [libc.malloc(100 << 10) for _ in range(100)]
for block in blocks:
    ctypes.memset(block, 1, 100 << 10)
assert process_memory().anon - before > 9 << 20
for block in blocks:
    libc.free(block)
print(process_memory().anon - before)
"""


def stays(*policies: str) -> int:
    run = subprocess.run([sys.executable, "-c", SCRIPT, *policies], capture_output=True, text=True, check=True)
    return int(run.stdout)


@needs_glibc
def test_without_filling_the_holes_a_threshold_gives_nothing_back() -> None:
    assert stays("holes left open") > 8 << 20


@needs_glibc
@pytest.mark.parametrize("policies", [("strict",), ("balanced", "strict"), ("strict", "default", "strict")])
def test_strict_gives_back_what_is_freed_whatever_the_heap_was(policies: tuple[str, ...]) -> None:
    assert stays(*policies) < 1 << 20


@needs_glibc
def test_the_default_uses_the_holes_again() -> None:
    assert stays("strict", "default") > 8 << 20


@needs_glibc
@pytest.mark.parametrize("policy", MallocPolicy)
def test_filling_costs_addresses_and_no_memory(policy: MallocPolicy) -> None:
    script = (
        "import sys; from narrowboat.machine.malloc import set_malloc_policy, trim\n"
        "from narrowboat.machine.memory import process_memory\n"
        "import torch\n"
        "kept = [torch.ones(20000 + i) for i in range(400)][::2]\n"
        "trim(); before = process_memory().rss\n"
        "set_malloc_policy(sys.argv[1])\n"
        "for _ in range(50): trim()\n"
        "print(process_memory().rss - before)"
    )
    run = subprocess.run([sys.executable, "-c", script, policy.value], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 2 << 20
