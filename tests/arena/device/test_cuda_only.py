"""What only a GPU can show. Skipped, with the reason, where there is none."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

from narrowboat.arena.device.cuda import CudaDevice, translated
from narrowboat.arena.device.find import open_device
from narrowboat.arena.device.mirror import Mirror
from narrowboat.arena.device.slab import DeviceSlab
from narrowboat.arena.slab import Slab
from narrowboat.errors import DeviceError, DeviceMemoryError, PinnedMemoryError

pytestmark = pytest.mark.cuda


@pytest.fixture
def gpu() -> Any:
    try:
        return open_device("cuda")
    except DeviceError as error:
        pytest.skip(f"needs an NVIDIA GPU: {error}")


def test_what_the_device_says_of_itself(gpu: Any) -> None:
    free, total = gpu.memory()
    assert 0 < free <= total
    assert (free, total) == pytest.approx(torch.cuda.mem_get_info(gpu.index), rel=0.05)
    assert gpu.granularity >= 1 << 16 and gpu.granularity & (gpu.granularity - 1) == 0
    assert open_device(f"cuda:{gpu.index}") is gpu is open_device(gpu)
    assert gpu.driver.abilities.version >= 11000


def test_a_captured_graph_stays_good_while_memory_goes_and_comes_back(gpu: Any, kit: Any) -> None:
    slab = DeviceSlab(gpu, 8 * gpu.granularity, populate=True)
    count = slab.nbytes // 4
    values = torch.arange(count, dtype=torch.float32)
    kit.put(slab, 0, values.view(torch.uint8))
    weight = slab.tensor(0, torch.float32, (count,))
    factor, result = torch.full((1,), 2.0, device="cuda"), torch.empty(count, device="cuda")

    def compute() -> None:
        torch.mul(weight, factor, out=result)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute()
    mirror = Mirror(slab, slab.nbytes)
    for turn in range(1, 4):
        factor.fill_(turn)
        result.zero_()
        graph.replay()
        assert torch.equal(result.cpu(), values * turn)
        mirror.evict(save=turn == 1)
        others = torch.full((slab.nbytes,), 0xFF, dtype=torch.uint8, device="cuda")  # may be the memory that went
        gpu.synchronize()
        del others
        torch.cuda.empty_cache()
        mirror.restore()
        result.zero_()
        graph.replay()  # after the copies, by the events alone
        assert torch.equal(result.cpu(), values * turn)
    mirror.verify()
    mirror.close()
    slab.close()


def test_kernels_of_libraries_work_on_mapped_memory(gpu: Any, kit: Any) -> None:
    slab = DeviceSlab(gpu, 4 << 20, populate=True)
    matrix = torch.randn(512, 512)
    kit.put(slab, 4096, matrix.view(-1).view(torch.uint8))
    weight, x = slab.tensor(4096, torch.float32, (512, 512)), torch.randn(8, 512)
    there = weight.clone()  # of PyTorch's own
    assert torch.equal(x.cuda() @ weight, x.cuda() @ there)
    assert torch.equal(torch.nn.functional.linear(x.cuda(), weight), torch.nn.functional.linear(x.cuda(), there))
    slab.close()


def test_pytorchs_allocator_is_not_affected(gpu: Any) -> None:
    kept = torch.arange(1000, device="cuda")
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    slab = DeviceSlab(gpu, 16 * gpu.granularity, populate=True)
    slab.release([(0, slab.nbytes)])
    slab.hold([(0, slab.nbytes)])
    slab.close()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    assert torch.equal(kept.cpu(), torch.arange(1000))


def test_any_thread_may_call_and_none_has_its_device_changed(gpu: Any) -> None:
    found: list[Any] = []

    def call() -> None:
        found.append(gpu.memory()[1])
        slab = DeviceSlab(gpu, gpu.granularity, populate=True)
        found.append(bytes(slab.bytes_at(0, 1)) != b"" and torch.cuda.current_device())
        slab.close()

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert found == [gpu.memory()[1], torch.cuda.current_device()]


def test_pinning_twice_is_refused(gpu: Any) -> None:
    host = Slab(1 << 20)
    gpu.pin(host)
    with pytest.raises(PinnedMemoryError, match="cannot pin"):
        gpu.pin(host)
    gpu.unpin(host)
    gpu.unpin(host)
    assert gpu.pinned_bytes == 0


def test_pytorch_out_of_memory_is_translated(gpu: Any) -> None:
    with pytest.raises(DeviceMemoryError, match="are free"), translated(gpu.memory):
        torch.empty(4 * gpu.memory()[1], dtype=torch.uint8, device="cuda")
    assert torch.zeros(1, device="cuda").item() == 0


def test_a_copy_stream_is_none_of_pytorchs(gpu: Any) -> None:
    own = gpu.stream("copies")
    assert own.handle not in {torch.cuda.Stream().cuda_stream for _ in range(40)} | {0}
    event = own.record(timed=True)
    event.wait()
    assert event.done()


def test_unified_can_be_asked_for_on_any_gpu(gpu: Any) -> None:
    device = CudaDevice(gpu.index, unified=True)
    assert device.unified and not (gpu.unified and not gpu.driver.abilities.integrated)


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)


PRELUDE = """
import gc, os, sys, torch
from narrowboat.arena.device.find import open_device
from narrowboat.arena.device.mirror import Mirror
from narrowboat.arena.device.slab import DeviceSlab
from narrowboat.errors import *
gpu = open_device("cuda")
slab = DeviceSlab(gpu, 4 * gpu.granularity, populate=True)
"""


def test_a_lost_device_is_told_and_can_be_tidied_up(gpu: Any) -> None:
    done = run(
        PRELUDE
        + """
tensor = slab.tensor(0, torch.float32, (1000,))
mirror = Mirror(slab, slab.nbytes)
slab.release([(0, slab.nbytes)])
try:
    (tensor + 1).sum()
    gpu.synchronize()
except RuntimeError as error:
    assert "CUDA error" in str(error)
except DeviceLostError:
    pass
try:
    gpu.synchronize()
except DeviceLostError as error:
    print("lost")
mirror.close()
slab.close()
print("closed")
"""
    )
    assert done.stdout.split() == ["lost", "closed"], done.stderr


def test_a_forked_child_gets_an_error_and_no_crash(gpu: Any) -> None:
    done = run(
        PRELUDE
        + """
child = os.fork()
if child == 0:
    try:
        slab.hold([(0, 1)])
        slab.release([(0, slab.nbytes)])
    except DeviceError as error:
        code = 7
    try:
        gpu.memory()
    except NoDeviceError:
        code += 1
    try:
        open_device("cuda:0").memory()
    except NoDeviceError:
        code += 1
    del slab
    gc.collect()
    os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
assert gpu.memory()[0] > 0
print("right")
"""
    )
    assert (done.returncode, done.stdout.strip()) == (0, "right"), done.stderr


def test_leaving_with_everything_open_is_silent(gpu: Any) -> None:
    done = run(
        PRELUDE
        + """
mirror = Mirror(slab, slab.nbytes)
mirror.evict(gpu.granularity, save=True)
tensor = slab.tensor(2 * gpu.granularity, torch.float32, (1000,))
stream = gpu.stream("copies")
event = stream.record()
print("right")
"""
    )
    assert (done.returncode, done.stdout.strip()) == (0, "right"), done.stderr
    assert "Error" not in done.stderr and "Exception" not in done.stderr
