"""The whole heap keeps what is freed until it is asked for it, in a child process each."""

import subprocess
import sys

import pytest

from narrowboat.machine.malloc import allocator_name

pytestmark = pytest.mark.skipif(
    allocator_name() != "glibc", reason=f"the allocator is {allocator_name()}, not glibc's"
)

# Blocks as large as glibc would map by themselves; every second one is freed, so that holes stay between the others.
CHILD = """
import ctypes, sys
from narrowboat.machine.malloc import MallocPolicy, set_malloc_policy
from narrowboat.machine.memory import private_bytes
from narrowboat.machine.whole_heap import give_back, map_apart, open_whole_heap
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
size, count = 40 << 20, 6
def take(number):
    blocks = [libc.malloc(size) for _ in range(number)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    return blocks
def drop(blocks):
    for block in blocks:
        libc.free(block)
assert open_whole_heap()
start = private_bytes()
blocks = take(count)
full = private_bytes() - start
drop(blocks[::2])
kept = private_bytes() - start
again = take(count // 2)  # into the holes
refilled = private_bytes() - start
drop(again)
give_back()
given = private_bytes() - start
map_apart()
drop(take(1))
apart = private_bytes() - start
drop(blocks[1::2])
set_malloc_policy(MallocPolicy.DEFAULT)
print(*(round(each / size, 1) for each in (full, kept, refilled, given, apart)))
"""


def test_holes_are_kept_used_again_and_given_back_when_asked() -> None:
    run = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    full, kept, refilled, given, apart = map(float, run.stdout.split())
    assert full == pytest.approx(6, abs=0.2)
    assert kept == pytest.approx(6, abs=0.2)
    assert refilled == pytest.approx(6, abs=0.2)
    assert given == pytest.approx(3, abs=0.4)  # huge pages round up
    assert apart == pytest.approx(given, abs=0.2)
