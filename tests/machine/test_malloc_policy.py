"""The allocator policies change what stays resident, in a child process each."""

import subprocess
import sys

import pytest

from narrowboat.machine.malloc import MallocPolicy, allocator_name, set_malloc_policy, trim

needs_glibc = pytest.mark.skipif(
    allocator_name() != "glibc", reason=f"the allocator is {allocator_name()}, not glibc's"
)

# Every second block is freed, so that the heap has holes that trimming its end cannot give back.
HOLES = """
import ctypes, sys
from narrowboat.machine.malloc import set_malloc_policy
from narrowboat.machine.memory import process_memory
assert set_malloc_policy(sys.argv[1]) is True
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
if sys.argv[1] == "default":
    libc.free(libc.malloc(16 << 20))  # glibc learns from this: its threshold is 16 MiB now
size, count = 2 << 20, 32
blocks = [libc.malloc(size) for _ in range(count)]
for block in blocks:
    ctypes.memset(block, 1, size)
before = process_memory().anon
for block in blocks[::2]:
    libc.free(block)
print(before - process_memory().anon)
"""


def given_back(policy: MallocPolicy) -> int:
    run = subprocess.run([sys.executable, "-c", HOLES, policy.value], capture_output=True, text=True, check=True)
    return int(run.stdout)


@needs_glibc
def test_strict_gives_freed_blocks_back_at_once() -> None:
    assert given_back(MallocPolicy.STRICT) >= 30 << 20


@needs_glibc
def test_the_default_keeps_holes_resident() -> None:
    assert given_back(MallocPolicy.DEFAULT) < 4 << 20


@needs_glibc
@pytest.mark.parametrize("first", MallocPolicy)
@pytest.mark.parametrize("second", MallocPolicy)
def test_every_policy_is_accepted_after_every_other(first: MallocPolicy, second: MallocPolicy) -> None:
    script = (
        "import sys; from narrowboat.machine.malloc import set_malloc_policy\n"
        "print(all(map(set_malloc_policy, sys.argv[1:])))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, first.value, second.value], capture_output=True, text=True, check=True
    )
    assert run.stdout == "True\n"


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="loose"):
        set_malloc_policy("loose")


def test_another_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narrowboat.machine.malloc.allocator_name", lambda: "jemalloc")
    assert set_malloc_policy(MallocPolicy.STRICT) is False
    assert trim() is False


OWN_HEAP = """
import ctypes, threading
from narrowboat.machine.malloc import give_back_own_heap, set_malloc_policy, trim
from narrowboat.machine.memory import resident_bytes
set_malloc_policy("default"); set_malloc_policy("lean"); set_malloc_policy("default")
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
held, blocks = [], [0] * 200
def use():
    for i in range(200):
        blocks[i] = libc.malloc(100 << 10)
        ctypes.memset(blocks[i], 1, 100 << 10)
    for block in blocks:
        libc.free(block)
def work():
    before = resident_bytes()
    use()
    trim()
    held.append(resident_bytes() - before)
    give_back_own_heap()
    held.append(resident_bytes() - before)
    use()
    held.append(resident_bytes() - before)
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(*held)
"""


@needs_glibc
def test_a_thread_gives_the_end_of_its_heap_back_and_the_policy_stays_in_force() -> None:
    done = subprocess.run([sys.executable, "-c", OWN_HEAP], capture_output=True, text=True, check=True)
    trimmed, given_back, afterwards = map(int, done.stdout.split())
    assert trimmed > 15 << 20  # what malloc_trim cannot reach
    assert given_back < 2 << 20
    assert afterwards > 15 << 20  # "default" keeps what is freed, as before
