"""Stepping within the backward pass gives the bits of accumulating, clipping and stepping afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim

from narrowboat.errors import TrainingError
from narrowboat.train.state import BucketedOptimizer, GradientStore, InBackward, StoredOptimizer
from narrowboat.train.state.predict import gradient_bytes

BUCKET = 30_000


def made(kit: Any, net: Any, folder: Path, *, on_storage: bool, store: bool, **options: Any) -> InBackward:
    optimizer = kit.optimizer(net, optim.AdamW)
    stepper = (
        StoredOptimizer(optimizer, folder, bucket_bytes=BUCKET, temporary=True)
        if on_storage
        else BucketedOptimizer(optimizer, bucket_bytes=BUCKET)
    )
    gradients = None
    if store:
        gradients = GradientStore(net.parameters(), folder, bucket_bytes=BUCKET, buckets=stepper.buckets)
    return InBackward(stepper, gradients=gradients, **options)


@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("store", [False, True], ids=["gradients in memory", "gradients stored"])
@pytest.mark.parametrize("on_storage", [False, True], ids=["state in memory", "state stored"])
def test_steps_have_the_bits_of_the_plain_loop(
    kit: Any, tmp_path: Path, on_storage: bool, store: bool, rounds: int, max_norm: float | None
) -> None:
    plain, net = kit.net(), kit.net()
    optimizer = kit.optimizer(plain, optim.AdamW)
    step = made(kit, net, tmp_path, on_storage=on_storage, store=store, max_norm=max_norm)
    for number in range(3):
        optimizer.zero_grad()
        for part in range(rounds):
            kit.loss(plain, rounds * number + part).backward()
            step.begin(last=part == rounds - 1)
            kit.loss(net, rounds * number + part).backward()
            assert step.stepped == (part == rounds - 1 and max_norm is None)
        want = None if max_norm is None else nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
        optimizer.step()
        norm = step.finish()
        assert norm is want is None or torch.equal(norm, want)
        kit.assert_same_net(plain, net)
        assert all(parameter.grad is None for parameter in net.parameters())
    kit.assert_same_state(optimizer.state_dict(), step._optimizer.optimizer.state_dict())
    step.close()


def peak_of(parameters: list[torch.Tensor], backward: Callable[[], None]) -> int:
    """Most bytes of gradients that there were at a time, seen as each is complete."""
    most = 0

    def look(_: torch.Tensor) -> None:
        nonlocal most
        most = max(most, sum(p.grad.nbytes for p in parameters if p.grad is not None))

    handles = [parameter.register_post_accumulate_grad_hook(look) for parameter in parameters]
    backward()
    for handle in handles:
        handle.remove()
    return most


def test_gradients_of_a_chain_take_about_a_bucket(kit: Any, tmp_path: Path) -> None:
    net = nn.Sequential(*[nn.Linear(64, 64) for _ in range(12)])
    parameters = list(net.parameters())
    optimizer = BucketedOptimizer(optim.SGD(parameters, lr=0.1), bucket_bytes=2 * 64 * 65 * 4)
    step = InBackward(optimizer)
    step.begin(last=True)
    most = peak_of(parameters, lambda: net(torch.randn(2, 64)).sum().backward())
    step.finish()
    assert most <= 2 * 64 * 65 * 4 < gradient_bytes(parameters) // 5


def test_between_micro_batches_a_store_leaves_no_gradient_in_memory(kit: Any, tmp_path: Path) -> None:
    net = kit.net()
    step = made(kit, net, tmp_path, on_storage=True, store=True)
    for part in range(3):
        step.begin(last=part == 2)
        assert step._store is not None and step._store.waiting_bytes == 0
        kit.loss(net, part).backward()
        assert all(parameter.grad is None for parameter in net.parameters())
    step.finish()
    step.close()


@pytest.mark.parametrize("store", [False, True], ids=["gradients in memory", "gradients stored"])
def test_a_step_given_up_before_anything_was_stepped_can_be_made_again(kit: Any, tmp_path: Path, store: bool) -> None:
    plain, net = kit.net(), kit.net()
    optimizer = kit.optimizer(plain, optim.AdamW)
    step = made(kit, net, tmp_path, on_storage=True, store=store)
    step.begin(last=False)
    kit.loss(net, 0).backward()
    assert not step.stepped
    step.abandon()
    net.load_state_dict(plain.state_dict())  # batch statistics moved
    step.begin(last=True)
    kit.loss(net, 1).backward()
    step.finish()
    kit.loss(plain, 1).backward()
    optimizer.step()
    kit.assert_same_net(plain, net)


def test_once_something_was_stepped_it_cannot_be_given_up_silently(kit: Any, tmp_path: Path) -> None:
    net = kit.net()
    step = made(kit, net, tmp_path, on_storage=True, store=False)
    step.begin(last=True)
    kit.loss(net, 0).backward()
    assert step.stepped
    with pytest.raises(TrainingError, match="were stepped before"):
        step.abandon()
    step.begin(last=False)
    with pytest.raises(TrainingError, match="last=True"):
        step.finish()


def test_a_norm_that_is_not_finite_is_refused_where_asked(kit: Any, tmp_path: Path) -> None:
    net = kit.net()
    before = {name: value.clone() for name, value in net.named_parameters()}
    step = made(kit, net, tmp_path, on_storage=False, store=False, max_norm=1.0, error_if_nonfinite=True)
    step.begin(last=True)
    (kit.loss(net, 0) * float("inf")).backward()
    with pytest.raises(TrainingError, match="cannot be clipped"):
        step.finish()
    step.abandon()
    assert all(torch.equal(value, before[name]) for name, value in net.named_parameters())


@pytest.mark.parametrize("store", [False, True], ids=["gradients in memory", "gradients stored"])
def test_parameters_may_be_frozen_and_thawed_between_steps(kit: Any, tmp_path: Path, store: bool) -> None:
    plain, net = kit.net(), kit.net()
    optimizer = kit.optimizer(plain, optim.AdamW)
    step = made(kit, net, tmp_path, on_storage=True, store=store, max_norm=None)
    for number, trained in enumerate((False, True, False)):
        for each in (plain, net):
            each.first.requires_grad_(trained)
        step.begin(last=True)
        kit.loss(net, number).backward()
        step.finish()
        optimizer.zero_grad()
        kit.loss(plain, number).backward()
        optimizer.step()
        kit.assert_same_net(plain, net)


def test_a_stores_buckets_have_to_be_the_optimizers(kit: Any, tmp_path: Path) -> None:
    net = kit.net()
    optimizer = BucketedOptimizer(kit.optimizer(net, optim.AdamW), bucket_bytes=BUCKET)
    store = GradientStore(net.parameters(), tmp_path, bucket_bytes=BUCKET // 8)
    with pytest.raises(TrainingError, match="buckets"):
        InBackward(optimizer, gradients=store)
