"""Gradients that wait on storage are those that would have waited in ``p.grad``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from narrowboat.errors import TrainingError
from narrowboat.train.state import GradientStore

BUCKET = 12_000


def read_all(store: GradientStore) -> dict[int, torch.Tensor]:
    """Copies of all sums, by the parameter's place in the store's own order."""
    order = {id(parameter): number for number, parameter in enumerate(store._parameters)}
    found = {}
    for index, bucket in enumerate(store.buckets):
        record = store.read(index)
        for parameter in bucket:
            if parameter.grad is not None:
                found[order[id(parameter)]] = parameter.grad.clone()
        store.release(index, record)
    return found


@pytest.fixture
def store_of(tmp_path: Path) -> Any:
    opened: list[GradientStore] = []

    def make(parameters: Any, **options: Any) -> GradientStore:
        opened.append(GradientStore(parameters, tmp_path, **{"bucket_bytes": BUCKET, **options}))
        return opened[-1]

    yield make
    for store in opened:
        store.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("flush", [False, True], ids=["as buckets fill", "flushed each time"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_sums_and_norms_have_the_bits_of_plain_accumulation(kit: Any, store_of: Any, rounds: int, flush: bool) -> None:
    plain, net = kit.net(), kit.net()
    store = store_of(net.parameters())
    store.attach()
    for number in range(rounds):
        kit.loss(plain, number).backward()
        kit.loss(net, number).backward()
        assert all(parameter.grad is None for parameter in net.parameters())
        if flush:
            store.flush()
            assert store.waiting_bytes == 0
    grads = {i: p.grad.clone() for i, p in enumerate(plain.parameters()) if p.grad is not None}
    for order in (2.0, 1.0, float("inf")):
        want = nn.utils.get_total_norm(list(grads.values()), order)
        assert torch.equal(store.norm(order), want)
    found = read_all(store)
    assert found.keys() == grads.keys()
    for i, grad in grads.items():
        assert torch.equal(found[i], grad) and found[i].stride() == grad.stride(), i


def test_clipping_has_the_bits_of_torchs(kit: Any, store_of: Any) -> None:
    plain, net = kit.net(), kit.net()
    store = store_of(net.parameters())
    store.attach()
    for number in range(2):
        kit.loss(plain, number).backward()
        kit.loss(net, number).backward()
    for parameter in plain.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(0.5)
    store.scale(0.5)
    want = nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    assert torch.equal(store.clip(0.1), want) and want > 0.1
    found = read_all(store)
    for i, parameter in enumerate(plain.parameters()):
        assert parameter.grad is None or torch.equal(found[i], parameter.grad)


def test_norms_over_several_dtypes_are_summed_in_torchs_order(store_of: Any) -> None:
    torch.manual_seed(1)
    dtypes = [torch.float32, torch.bfloat16, torch.float16] * 30
    parameters = [nn.Parameter(torch.randn(20).to(dtype)) for dtype in dtypes]
    store = store_of(parameters, bucket_bytes=300)
    for trial in range(20):
        for parameter in parameters:
            parameter.grad = torch.randn(20).to(parameter.dtype) * 10 ** (trial / 7)
        want = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        for parameter in parameters:
            store.accept(parameter)
        assert torch.equal(store.norm(), want) and store.norm().dtype == want.dtype
        store.clear()


def test_parameters_may_get_gradients_in_some_micro_batches_only(store_of: Any) -> None:
    parameters = [nn.Parameter(torch.ones(40)) for _ in range(6)]
    sums: dict[int, torch.Tensor] = {}
    store = store_of(parameters, bucket_bytes=3 * 160)
    store.attach()
    for chosen in ([0, 5], [0, 1, 2], [3, 5], [1, 3]):
        torch.stack([(parameters[i] * (i + 0.1)).sum() for i in chosen]).sum().backward()
        store.flush()
        for i in chosen:
            sums[i] = sums[i] + (i + 0.1) if i in sums else torch.full((40,), i + 0.1)
    found = read_all(store)
    assert found.keys() == sums.keys()
    assert all(torch.equal(found[i], sums[i]) for i in sums)


def test_what_waits_in_memory_is_bounded_when_buckets_fill_at_the_same_time(store_of: Any) -> None:
    parameters = [nn.Parameter(torch.ones(1000)) for _ in range(40)]
    store = store_of(parameters, bucket_bytes=16_000)
    most = 0
    for _ in range(2):
        for i in sorted(range(40), key=lambda i: i % 4):  # all ten buckets fill together
            parameters[i].grad = torch.full((1000,), float(i))
            store.accept(parameters[i])
            most = max(most, store.waiting_bytes)
        store.flush()
    assert most <= 2 * 16_000
    assert store._file.buffer_peak <= 3 * 16_384
    found = read_all(store)
    assert all(torch.equal(found[i], torch.full((1000,), 2.0 * i)) for i in range(40))


def test_a_step_that_was_given_up_leaves_nothing(kit: Any, store_of: Any) -> None:
    plain, net = kit.net(), kit.net()
    store = store_of(net.parameters())
    store.attach()
    kit.loss(net, 1).backward()
    store.scale(3.0)
    store.clear()
    assert store.norm() == 0
    net.load_state_dict(plain.state_dict())  # batch statistics moved
    kit.loss(plain, 2).backward()
    kit.loss(net, 2).backward()
    found = read_all(store)
    for i, parameter in enumerate(plain.parameters()):
        assert parameter.grad is None or torch.equal(found[i], parameter.grad)
    store.detach()
    kit.loss(net, 2).backward()
    assert net.head.weight.grad is not None


def test_what_it_cannot_keep_is_told(store_of: Any) -> None:
    table = nn.Embedding(10, 4, sparse=True)
    store = store_of(table.parameters())
    store.attach()
    with pytest.raises(TrainingError, match="sparse"):
        table(torch.tensor([1])).sum().backward()
    parameter = nn.Parameter(torch.ones(3))
    other = store_of([parameter])
    for value in (1.0, float("nan")):
        parameter.grad = torch.full((3,), value)
        other.accept(parameter)
    with pytest.raises(TrainingError, match="nan"):
        other.clip(1.0, error_if_nonfinite=True)
    other.scale(2.0)
    parameter.grad = torch.ones(3)
    with pytest.raises(TrainingError, match="scaled"):
        other.accept(parameter)
