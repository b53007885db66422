"""Whatever ends the process in the middle of a step, the state on storage is that of the last whole step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# The one process that imports torch forks a child per trial, ends it at a random moment, and looks what is there.
CODE = """
import os, random, select, shutil, signal, sys, time
import torch
from narrowboat.train.state import StoredOptimizer

torch.set_num_threads(1)  # a forked child has none of the parent's OpenMP threads, and would wait for them for ever
folder = sys.argv[1]
random.seed(7)

def made():
    torch.manual_seed(0)
    net = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(6)])
    return net, torch.optim.Adam(net.parameters(), amsgrad=True)

def gradients(net, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)

def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(value, other[number][key]) for number, state in one.items() for key, value in state.items()
    )

def endless(write):
    net, optimizer = made()
    stored = StoredOptimizer(optimizer, folder, bucket_bytes=40_000)
    step = 0
    while True:
        step += 1
        gradients(net, step)
        optimizer.step()
        os.write(write, step.to_bytes(4, "little"))

for end_with in [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]:
    shutil.rmtree(folder, ignore_errors=True)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        endless(write)
    os.close(write)
    os.read(read, 4)  # its first step
    time.sleep(random.random() * 0.08)
    os.kill(child, end_with)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == end_with
    told = 1
    while piece := os.read(read, 4):
        told = int.from_bytes(piece, "little")
    os.close(read)
    net, plain = made()
    resumed_net, optimizer = made()
    stored = StoredOptimizer(optimizer, folder, bucket_bytes=12_345, resume=True)
    assert stored.commits in (told, told + 1), (stored.commits, told)
    for step in range(1, stored.commits + 1):
        gradients(net, step)
        plain.step()
    assert same(plain.state_dict()["state"], optimizer.state_dict()["state"])
    resumed_net.load_state_dict(net.state_dict())
    for step in range(stored.commits + 1, stored.commits + 3):
        for each, by in ((net, plain), (resumed_net, optimizer)):
            gradients(each, step)
            by.step()
    assert same(plain.state_dict()["state"], optimizer.state_dict()["state"])
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), resumed_net.parameters()))
    stored.close()
print("ok")
"""


def test_after_a_kill_or_a_termination_the_last_whole_step_is_there(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CODE, str(tmp_path / "state")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.stdout.endswith("ok\n"), done.stderr
