"""Any schedule, however odd, gives the bits of the plain pass with activations in pinned memory and on storage."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from narrowboat.errors import DeviceError
from narrowboat.train.measure import chain as chain_module
from narrowboat.train.measure.chain import Rates, TrainingChain, build_chain
from narrowboat.train.measure.study import study
from narrowboat.train.spill_slots import PAGE
from narrowboat.train.tape.frames import StepPlan, compile_plan
from narrowboat.train.tape.run import TapeRun
from train_kit import CASES, Case, Course, cross_entropy, gradients, random_items

NAMES = ("mlp", "resnet", "gpt", "shared modules", "in place", "custom functions", "gathering", "counting")
STEPS = 2


def course(case: Case, passed: Callable[[Callable[[], torch.Tensor]], torch.Tensor]) -> Course:
    """Train a new model, each pass and its backward as ``passed`` has it; what came of it."""
    model = case.model()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    told = Course()
    torch.manual_seed(2)
    for x, y in case.batches(STEPS):
        optimizer.zero_grad()
        loss = passed(lambda x=x, y=y: cross_entropy(model(x), y))
        told.losses.append(loss.item())
        told.gradients.append(gradients(model))
        optimizer.step()
    return told.finish(model)


def plainly(loss: Callable[[], torch.Tensor]) -> torch.Tensor:
    made = loss()
    made.backward()
    return made


@cache
def plain(name: str) -> Course:
    return course(CASES[name], plainly)


@cache
def chain_of(name: str) -> TrainingChain:
    """With every option there is, however small the storages."""
    case = CASES[name]
    model = case.model()
    x, y = case.batches(1)[0]
    before, chain_module._SMALLEST_SPILL = chain_module._SMALLEST_SPILL, 1024
    try:
        tape = study(model, lambda a, b: cross_entropy(model(a), b), x, y).tape(case.samples)
        return build_chain(tape, rates=Rates(write=1e-9, read=1e-9))
    finally:
        chain_module._SMALLEST_SPILL = before


def scheduled(name: str, seed: int) -> StepPlan:
    chain = chain_of(name)
    items = random_items(random.Random(f"{name} {seed}"), 0, len(chain.options), chain.options)
    return compile_plan(chain.tape, chain.cuts, chain.options, items)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(NAMES),
    seed=st.integers(0, 1 << 20),
    pages=st.sampled_from([8, 40, 4000]),
    behind=st.booleans(),
    in_flight=st.sampled_from([0, 4 * PAGE, 1 << 20]),
)
def test_random_schedules_give_the_bits_of_the_plain_pass(
    make_device: Any, make_pool: Any, watch: Any, name: str, seed: int, pages: int, behind: bool, in_flight: int
) -> None:
    plan, device = scheduled(name, seed), make_device(jitter=seed)

    def on_tape(loss: Callable[[], torch.Tensor]) -> torch.Tensor:
        run = TapeRun(plan, pool)
        with watch(device):
            with run.forward():
                made = loss()
            made.backward()
        assert run.departed is None
        run.close()
        return made

    with make_pool(device, pages * PAGE, behind=behind, in_flight=in_flight) as pool:
        assert course(CASES[name], on_tape).differences(plain(name)) == []
        pool.rest()
        assert (pool.bytes_in_slots, pool.bytes_in_flight) == (0, 0)
    assert device.pinned_bytes == 0


@pytest.mark.parametrize("line", ["self._out.wait(stream.record())", "self._device.compute().wait(arriving.event)"])
def test_a_missing_wait_is_seen_in_a_pass(make_device: Any, watch: Any, without: Any, line: str) -> None:
    device, model = make_device(), CASES["mlp"].model()
    x, y = CASES["mlp"].batches(1)[0]
    caught = 0
    for seed in range(8):
        run = TapeRun(scheduled("mlp", seed), pool := without(line)(device, 4000 * PAGE, in_flight=0))
        try:
            with watch(device):
                with run.forward():
                    loss = cross_entropy(model(x), y)
                loss.backward()
        except DeviceError as error:
            assert re.search("used before ready|in use", str(error))
            caught += 1
        run.close()
        pool.close()
    assert caught
