"""An optimizer with its state on storage is the optimizer: same bits, same state dict, same schedule."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import optim
from torch.optim.optimizer import register_optimizer_step_post_hook

from narrowboat.errors import SpillError, TrainingError, UsageError
from narrowboat.train.state import BucketedOptimizer, StoredOptimizer
from train_step_kit import GlobalNorm

BUCKET = 30_000
KINDS: list[tuple[type[optim.Optimizer], dict[str, Any]]] = [
    (optim.AdamW, {}),
    (optim.AdamW, {"foreach": True}),
    (optim.AdamW, {"fused": True}),
    (optim.Adam, {"amsgrad": True, "maximize": True}),
    (optim.SGD, {"lr": 0.1}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    (optim.RMSprop, {"centered": True, "momentum": 0.5}),
    (optim.Adagrad, {}),
    (optim.NAdam, {}),
    (optim.RAdam, {"foreach": True}),
    (optim.Rprop, {}),
    (optim.Adafactor, {}),
]
IDS = [f"{kind.__name__} {' '.join(settings)}".strip() for kind, settings in KINDS]


def train(kit: Any, net: Any, optimizer: optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        optimizer.zero_grad()
        kit.loss(net, number).backward()
        optimizer.step()


@pytest.mark.parametrize(("kind", "settings"), KINDS, ids=IDS)
def test_steps_have_the_bits_of_the_plain_optimizer(
    kit: Any, tmp_path: Path, kind: type[optim.Optimizer], settings: dict[str, Any]
) -> None:
    nets = [kit.net() for _ in range(4)]
    optimizers = [kit.optimizer(net, kind, **settings) for net in nets]
    stored = StoredOptimizer(optimizers[1], tmp_path, bucket_bytes=BUCKET)
    temporary = StoredOptimizer(optimizers[2], tmp_path, bucket_bytes=1, temporary=True)
    in_memory = BucketedOptimizer(optimizers[3], bucket_bytes=BUCKET)
    assert 2 < len(stored.buckets) < len(temporary.buckets) == len(list(nets[0].parameters()))
    for number in range(4):
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            kit.loss(net, number).backward()
            (in_memory if optimizer is optimizers[3] else optimizer).step()
    want = optimizers[0].state_dict()
    for net, optimizer in zip(nets[1:], optimizers[1:], strict=True):
        kit.assert_same_net(nets[0], net)
        kit.assert_same_state(want, optimizer.state_dict())
    stored.close()
    temporary.close()


def test_state_is_not_in_memory_between_steps_and_gradients_are_freed(kit: Any, tmp_path: Path) -> None:
    net = kit.net()
    optimizer = kit.optimizer(net, optim.AdamW)
    stored = StoredOptimizer(optimizer, tmp_path, bucket_bytes=BUCKET)
    train(kit, net, optimizer, range(1))
    assert len(optimizer.state) == 0
    assert all(parameter.grad is None for parameter in net.parameters())
    with pytest.raises(TrainingError, match="on storage"):
        optimizer.state[net.unused]
    with pytest.raises(TrainingError, match="state_dict"):
        copy.deepcopy(optimizer)
    with pytest.raises(TrainingError, match="state_dict"):
        pickle.dumps(optimizer)
    stored.close()


def test_schedulers_made_before_and_after_work_and_do_not_warn(kit: Any, tmp_path: Path) -> None:
    def run(folder: Path | None) -> tuple[Any, list[float]]:
        net = kit.net()
        optimizer = kit.optimizer(net, optim.AdamW)
        before = optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        stored = StoredOptimizer(optimizer, folder, bucket_bytes=BUCKET) if folder else None
        after = optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        rates = []
        for number in range(4):
            train(kit, net, optimizer, range(number, number + 1))
            before.step()
            after.step()
            rates.append(optimizer.param_groups[1]["lr"])
        if stored is not None:
            stored.close()
            assert stored.commits == 4
        return net, rates

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (plain, want), (net, rates) = run(None), run(tmp_path)
    assert rates == want and len(set(rates)) == 4
    kit.assert_same_net(plain, net)


def test_a_grad_scaler_steps_it(kit: Any, tmp_path: Path) -> None:
    nets = [kit.net(), kit.net()]
    optimizers = [kit.optimizer(net, optim.AdamW, fused=True) for net in nets]
    stored = StoredOptimizer(optimizers[1], tmp_path, bucket_bytes=BUCKET)
    for net, optimizer in zip(nets, optimizers, strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for number in range(3):
            optimizer.zero_grad()
            scaler.scale(kit.loss(net, number)).backward()
            if number == 1:
                net.head.weight.grad[0, 0] = float("inf")  # this step is to be skipped
            scaler.step(optimizer)
            scaler.update()
    kit.assert_same_net(*nets)
    kit.assert_same_state(*(optimizer.state_dict() for optimizer in optimizers))
    stored.close()


class Derived(optim.AdamW):
    """Its step calls its base's, around which torch has put the hooks too."""

    def step(self, closure: Any = None) -> None:
        super().step()


@pytest.mark.parametrize("kind", [optim.AdamW, Derived])
def test_step_hooks_run_once_per_whole_step(kit: Any, tmp_path: Path, kind: type[optim.Optimizer]) -> None:
    net = kit.net()
    optim.AdamW(net.parameters())  # from now on its step has the hooks
    optimizer = kit.optimizer(net, kind)
    stored = StoredOptimizer(optimizer, tmp_path, bucket_bytes=BUCKET)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(kit, net, optimizer, range(2))
    assert seen == ["before", "after"] * 2
    if kind is optim.AdamW:
        handle = register_optimizer_step_post_hook(lambda *_: seen.append("all"))
        train(kit, net, optimizer, range(2))
        handle.remove()
        assert seen[4:] == ["before", "after", "all"] * 2
    stored.close()


def test_a_state_dict_is_saved_and_loaded_as_ever(kit: Any, tmp_path: Path) -> None:
    plain, net = kit.net(), kit.net()
    optimizer, other = kit.optimizer(plain, optim.AdamW), kit.optimizer(net, optim.AdamW)
    train(kit, plain, optimizer, range(2))
    stored = StoredOptimizer(other, tmp_path / "state", bucket_bytes=BUCKET)
    torch.save(optimizer.state_dict(), tmp_path / "saved.pt")
    other.load_state_dict(torch.load(tmp_path / "saved.pt"))
    assert len(other.state) == 0
    kit.assert_same_state(optimizer.state_dict(), other.state_dict())
    net.load_state_dict(plain.state_dict())
    train(kit, plain, optimizer, range(2, 4))
    train(kit, net, other, range(2, 4))
    kit.assert_same_net(plain, net)
    other.load_state_dict(kit.optimizer(net, optim.AdamW).state_dict())  # of an optimizer that made no step
    assert not other.state_dict()["state"]
    stored.close()


def test_state_moves_to_storage_and_back_between_steps(kit: Any, tmp_path: Path) -> None:
    plain, net = kit.net(), kit.net()
    optimizer, other = kit.optimizer(plain, optim.NAdam), kit.optimizer(net, optim.NAdam)
    train(kit, plain, optimizer, range(6))
    train(kit, net, other, range(2))
    stored = StoredOptimizer(other, tmp_path, bucket_bytes=BUCKET, temporary=True)
    scheduler = optim.lr_scheduler.ConstantLR(other, 1.0)  # its wrapper of the step outlives the storage
    train(kit, net, other, range(2, 4))
    scheduler.step()
    stored.release()
    train(kit, net, other, range(4, 6))
    kit.assert_same_net(plain, net)
    assert len(other.state) == len(optimizer.state)
    assert os.listdir(tmp_path) == []


def test_it_goes_on_from_a_folder_when_asked_to(kit: Any, tmp_path: Path) -> None:
    plain, net = kit.net(), kit.net()
    optimizer, other = kit.optimizer(plain, optim.AdamW), kit.optimizer(net, optim.AdamW)
    train(kit, plain, optimizer, range(4))
    stored = StoredOptimizer(other, tmp_path, bucket_bytes=BUCKET, resume=True)
    train(kit, net, other, range(2))
    stored.close()
    again = kit.optimizer(net, optim.AdamW)
    with pytest.raises(UsageError, match="resume"):
        StoredOptimizer(again, tmp_path, bucket_bytes=BUCKET)
    with pytest.raises(TrainingError, match="another optimizer"):
        StoredOptimizer(kit.optimizer(net, optim.SGD, lr=1.0), tmp_path, bucket_bytes=BUCKET, resume=True)
    resumed = StoredOptimizer(again, tmp_path, bucket_bytes=7 * BUCKET, resume=True)
    assert resumed.commits == 2
    train(kit, net, again, range(2, 4))
    kit.assert_same_net(plain, net)
    kit.assert_same_state(optimizer.state_dict(), again.state_dict())
    resumed.close()
    with pytest.raises(TrainingError, match="state of its own"):
        StoredOptimizer(optimizer, tmp_path, bucket_bytes=BUCKET, resume=True)
    assert optimizer.state[plain.head.weight]


class Counting(optim.SGD):
    """Keeps a count in its group, as some optimizers do; it depends on no parameter."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["last"] = group["count"]
                    parameter.data.sub_(parameter.grad, alpha=group["lr"] / group["count"])


def test_plain_values_in_the_state_and_counts_in_the_groups_are_kept(kit: Any, tmp_path: Path) -> None:
    plain, net = kit.net(), kit.net()
    optimizer, other = kit.optimizer(plain, Counting, lr=0.1), kit.optimizer(net, Counting, lr=0.1)
    stored = StoredOptimizer(other, tmp_path, bucket_bytes=BUCKET)
    train(kit, plain, optimizer, range(3))
    train(kit, net, other, range(3))
    kit.assert_same_net(plain, net)
    kit.assert_same_state(optimizer.state_dict(), other.state_dict())
    stored.close()
    again = kit.optimizer(net, Counting, lr=0.1)
    resumed = StoredOptimizer(again, tmp_path, bucket_bytes=BUCKET, resume=True)
    assert {state["last"] for state in again.state_dict()["state"].values()} == {3}
    resumed.close()


class Noisy(optim.SGD):
    """Adds noise to its step."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(torch.randn_like(parameter))


class Wrapping(optim.SGD):
    """Has another optimizer do its work."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.inner = optim.SGD(self.param_groups, **settings)


@pytest.mark.parametrize(
    ("kind", "settings", "why"),
    [
        (optim.LBFGS, {}, "closure"),
        (GlobalNorm, {"lr": 1.0}, "not per parameter"),
        (Noisy, {"lr": 1.0}, "random"),
        (Wrapping, {"lr": 1.0}, "inner"),
    ],
)
def test_an_update_that_is_not_per_parameter_is_refused(
    kit: Any, tmp_path: Path, kind: Any, settings: dict[str, Any], why: str
) -> None:
    net = kit.net()
    optimizer = kind(net.parameters(), **settings)
    random = torch.get_rng_state()
    with pytest.raises(TrainingError, match=why):
        StoredOptimizer(optimizer, tmp_path / "state", bucket_bytes=BUCKET)
    assert torch.equal(torch.get_rng_state(), random)
    assert os.listdir(tmp_path) == []
    kit.assert_same_net(kit.net(), net)


def test_what_it_cannot_do_is_told(kit: Any, tmp_path: Path) -> None:
    net = kit.net()
    optimizer = kit.optimizer(net, optim.AdamW)
    stored = StoredOptimizer(optimizer, tmp_path, bucket_bytes=BUCKET)
    with pytest.raises(TrainingError, match="closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(TrainingError, match="already"):
        StoredOptimizer(optimizer, tmp_path, bucket_bytes=BUCKET)
    stored.begin()
    with pytest.raises(TrainingError, match="middle"):
        optimizer.state_dict()
    stored.give_up()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    with pytest.raises(TrainingError, match="parameters have changed"):
        optimizer.step()
    stored.close()


def test_a_step_that_fails_in_the_middle_is_neither_committed_nor_gone_on_with(
    kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = kit.net()
    optimizer = kit.optimizer(net, optim.AdamW)
    stored = StoredOptimizer(optimizer, tmp_path, bucket_bytes=BUCKET)
    train(kit, net, optimizer, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    calls = 0
    pwritev = os.pwritev

    def fails(*arguments: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(errno.EIO, "Input/output error")
        return pwritev(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fails)
        with pytest.raises(SpillError, match="Input/output error"):
            train(kit, net, optimizer, range(1, 2))
    with pytest.raises(TrainingError, match="load a saved state"):
        optimizer.step()
    with pytest.raises(TrainingError, match="load a saved state"):
        optimizer.state_dict()
    stored.close()
    again = kit.optimizer(net, optim.AdamW)
    resumed = StoredOptimizer(again, tmp_path, bucket_bytes=BUCKET, resume=True)
    assert resumed.commits == 1
    kit.assert_same_state(saved, again.state_dict())
    train(kit, net, again, range(1, 2))
    again.load_state_dict(saved)
    kit.assert_same_state(saved, again.state_dict())
    resumed.close()


CODE = """
import sys, torch
from narrowboat.train.state import StoredOptimizer, state_bytes
def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024
torch.set_num_threads(1)
parameters = [torch.nn.Parameter(torch.ones(1 << 19)) for _ in range(64)]  # 2 MiB each
gradient = torch.ones(1 << 19)
optimizer = torch.optim.AdamW(parameters, fused=True)
small = torch.nn.Parameter(torch.ones(9))
small.grad = torch.ones(9)
torch.optim.AdamW([small], fused=True).step()  # what a first step loads
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
stored = StoredOptimizer(optimizer, sys.argv[1], bucket_bytes=8 << 20, temporary=True)
for _ in range(2):
    for parameter in parameters:
        parameter.grad = gradient
    optimizer.step()
state = state_bytes(torch.optim.AdamW(parameters))
print(state >> 20, (status("VmHWM") - before) >> 20, stored.file.buffer_peak >> 20)
"""


def test_a_quarter_gibibyte_of_state_takes_the_memory_of_a_few_buckets(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    state, peak, buffers = map(int, done.stdout.split())
    assert state == 256
    assert buffers <= 24
    assert peak <= 48, "three buckets of 8 MiB, one that the first step makes, and what the interpreter takes"
