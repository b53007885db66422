"""A real gateway, its executor, and what happens when things go wrong."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from narrowboat.errors import (
    AdmissionError,
    BadRequestError,
    BeyondContractError,
    ConflictError,
    ExpiredError,
    JobFailedError,
    NoSuchTaskError,
    NotServingError,
    TasksChangedError,
    TooLargeError,
)
from narrowboat.serve.gateway import LiveGateway
from narrowboat.serve.interface import Reply
from serve_live_kit import ASKED, CLOCKED, FREE, Served, first, open_files, outcome, raw, until, with_gateway, write

ONES = torch.ones(1, 256)
REFILLED = 1.0  # seconds after which every contract of the tasks lets its whole burst in again
Ask = Callable[[Callable[[LiveGateway], Coroutine[Any, Any, None]]], None]


@pytest.fixture(scope="module")
def plain(nets: Path) -> torch.nn.Module:
    """The network of FREE in plain PyTorch."""
    import tasks_test_nets  # type: ignore[import-not-found]
    from safetensors.torch import load_file

    network: torch.nn.Module = tasks_test_nets.deep()
    network.load_state_dict(load_file(str(nets / "deep.safetensors")), strict=False)  # and its padding
    return network


@pytest.fixture(scope="module")
def served(nets: Path) -> Iterator[Served]:
    """One gateway for the tests that leave it as it was: starting one takes longer than what most of them do."""
    with Served(write(nets, ASKED + FREE + CLOCKED, name="shared.yaml")) as served:
        yield served


@pytest.fixture
def ask(served: Served) -> Ask:
    """Run a coroutine with that gateway."""
    return served.run


@pytest.fixture
def ask_afresh(served: Served) -> Ask:
    """The same, with contracts as if nobody had asked before."""
    time.sleep(max(0.0, served.last_asked + REFILLED - time.monotonic()))
    return served.run


def idle(gateway: LiveGateway) -> bool:
    """Whether no job's slot is taken."""
    live = gateway._supervisor.live
    return live is not None and all(form.slots.idle for form in live.offers._forms.values())


def test_answers_have_plain_pytorchs_bits_and_say_what_was_promised(ask_afresh: Ask, plain: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 256, generator=generator) for _ in range(40)]

    async def work(gateway: LiveGateway) -> None:
        replies: list[Reply] = []
        for start in range(0, len(inputs), 4):
            asked = [gateway.infer("free", {"x": raw(x)}) for x in inputs[start : start + 4]]
            replies += await asyncio.gather(*asked)
        with torch.inference_mode():
            assert all(torch.equal(first(reply), plain(x)) for x, reply in zip(inputs, replies, strict=True))
        promised = await gateway.infer("asked", {"x": raw(torch.ones(1, 128))})
        assert promised.admitted and promised.bound and promised.deadline == 400_000
        assert promised.response > 0 and promised.met == (promised.response <= 400_000)
        assert not replies[0].admitted and replies[0].bound is None
        assert idle(gateway)

    ask_afresh(work)


def test_what_is_asked_wrongly_is_refused_by_name_and_nothing_runs(ask: Ask) -> None:
    async def work(gateway: LiveGateway) -> None:
        good = {"x": raw(ONES)}
        for name, inputs, error, said in (
            ("nobody", good, NoSuchTaskError, "there is no task 'nobody'"),
            ("clocked", good, BadRequestError, "takes its inputs itself"),
            ("free", {}, BadRequestError, "input 'x' is missing"),
            ("free", {"x": raw(ONES), "y": raw(ONES)}, BadRequestError, "has no input 'y'"),
            ("free", {"x": raw(torch.ones(1, 255))}, BadRequestError, r"analysed for FP32 \[1, 256\]"),
            ("free", {"x": raw(torch.ones(256))}, BadRequestError, r"this is FP32 \[256\]"),
        ):
            with pytest.raises(error, match=said):
                await gateway.infer(name, inputs)
        assert idle(gateway)

    ask(work)


def test_more_than_the_contract_is_refused_with_the_time_to_wait(ask_afresh: Ask) -> None:
    async def work(gateway: LiveGateway) -> None:
        x = {"x": raw(torch.ones(1, 128))}
        crowd = await asyncio.gather(*(outcome(gateway.infer("asked", x)) for _ in range(30)))
        refused = [answer for answer in crowd if isinstance(answer, BeyondContractError)]
        assert len(refused) == 28 and sum(isinstance(answer, Reply) for answer in crowd) == 2
        assert all(error.retry_after and 0 < error.retry_after <= 0.4 for error in refused)
        await asyncio.sleep(0.45)
        assert isinstance(await gateway.infer("asked", x), Reply)
        assert idle(gateway)

    ask_afresh(work)


def test_expired_work_is_dropped_and_never_runs(ask: Ask) -> None:
    async def work(gateway: LiveGateway) -> None:
        before = {job.number for job in gateway.record(60).jobs if job.task == "free"}
        with pytest.raises(ExpiredError, match="had passed when it came"):
            await gateway.infer("free", {"x": raw(ONES)}, timeout=0)
        crowd = [outcome(gateway.infer("free", {"x": raw(ONES)}, timeout=1 if k else None)) for k in range(8)]
        answers = await asyncio.gather(*crowd)
        assert isinstance(answers[0], Reply)
        assert all(isinstance(answer, ExpiredError) for answer in answers[1:])
        await until(lambda: idle(gateway))
        await asyncio.sleep(0.3)
        jobs = [job for job in gateway.record(60).jobs if job.task == "free" and job.number not in before]
        assert len([job for job in jobs if job.finish is not None]) == 1

    ask(work)


def test_a_client_that_goes_takes_its_work_with_it(ask_afresh: Ask) -> None:
    async def work(gateway: LiveGateway) -> None:
        for _ in range(5):
            crowd = [asyncio.create_task(gateway.infer("free", {"x": raw(ONES)})) for _ in range(6)]
            await asyncio.sleep(0.001)
            for each in crowd:
                each.cancel()
            await asyncio.gather(*crowd, return_exceptions=True)
            await until(lambda: idle(gateway))
            await asyncio.sleep(0.1)
        assert isinstance(await gateway.infer("free", {"x": raw(ONES)}), Reply)

    ask_afresh(work)


def test_tasks_and_budget_change_by_admission_and_refusals_explain_themselves(ask: Ask) -> None:
    async def work(gateway: LiveGateway) -> None:
        feed = gateway.feed()
        seen: list[str] = []

        async def watch() -> None:
            async for event in feed:
                seen.append(event["event"])

        watching = asyncio.create_task(watch())
        before = gateway.plan()
        smaller = await gateway.what_if({"budget": "70MiB"})
        assert smaller["admitted"] and smaller["change"]["pause_us"] > 0 and gateway.plan() == before
        too_small = await gateway.what_if({"budget": "2MiB"})
        assert not too_small["admitted"] and too_small["reasons"]
        new = {"name": "new", "period": "20ms", "blocks": [{"load": "1ms", "compute": "9ms", "bytes": "1MiB"}]}
        assert (await gateway.what_if({"add": [{**new, "period": "2s"}]}))["admitted"]
        assert not (await gateway.what_if({"add": [{**new, "period": "9ms"}]}))["admitted"]
        with pytest.raises(ConflictError) as refused:
            await gateway.set_budget("2MiB")
        assert refused.value.details["reasons"]
        assert (await gateway.set_budget("70MiB"))["budget_bytes"] == 70 << 20
        without = await gateway.unload("asked")
        assert [task["name"] for task in without["tasks"]] == ["free", "clocked"]
        assert not gateway.face("asked").ready
        with pytest.raises(NotServingError, match="not admitted"):
            await gateway.infer("asked", {"x": raw(torch.ones(1, 128))})
        with pytest.raises(ConflictError):
            await gateway.load("asked", {"period": "10us", "deadline": "10us"})
        with pytest.raises(BadRequestError, match="cannot be set"):
            await gateway.load("asked", {"model": "os:system"})
        await gateway.load("asked")
        assert isinstance(await gateway.infer("asked", {"x": raw(torch.ones(1, 128))}), Reply)
        with pytest.raises(BadRequestError, match="not known here"):
            await gateway.what_if({"add": [{"name": "x", "period": "1s", "model": "os:system"}]})
        await gateway.set_budget("80MiB")
        feed.close()
        await watching
        assert seen[0] == "hello" and seen.count("plan") >= 3 and "tick" in seen

    ask(work)


def test_an_executor_that_is_killed_is_started_anew_and_nobody_hangs(ask_afresh: Ask, plain: torch.nn.Module) -> None:
    async def work(gateway: LiveGateway) -> None:
        await gateway.set_budget("70MiB")
        files = open_files()
        for _ in range(2):
            live = gateway._supervisor.live
            assert live is not None
            crowd = [asyncio.create_task(outcome(gateway.infer("free", {"x": raw(ONES)}))) for _ in range(40)]
            await asyncio.sleep(0)
            os.kill(live.pid, signal.SIGKILL)
            answers = await asyncio.wait_for(asyncio.gather(*crowd), 10)
            assert all(isinstance(answer, (Reply, NotServingError)) for answer in answers)
            assert any(isinstance(answer, NotServingError) and "SIGKILL" in str(answer) for answer in answers), answers
            with pytest.raises(NotServingError):
                await gateway.infer("free", {"x": raw(ONES)})
            await until(lambda: gateway.state == "restarting")
            await until(lambda: gateway.state == "serving")
            assert gateway._supervisor.live is not live
            with torch.inference_mode():
                assert torch.equal(first(await gateway.infer("free", {"x": raw(ONES)})), plain(ONES))
            assert gateway.plan()["budget_bytes"] == 70 << 20, "what was in force is in force again"
        assert open_files() == files
        await gateway.set_budget("80MiB")

    ask_afresh(work)


def test_an_executor_that_hangs_is_ended_and_started_anew(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narrowboat.serve.supervisor._SILENT", 2.0)

    async def work(gateway: LiveGateway) -> None:
        live = gateway._supervisor.live
        assert live is not None
        os.kill(live.pid, signal.SIGSTOP)
        answer = await asyncio.wait_for(outcome(gateway.infer("free", {"x": raw(ONES)})), 20)
        assert isinstance(answer, NotServingError)
        await until(lambda: gateway.state == "serving" and gateway._supervisor.live not in (None, live), 60)
        assert isinstance(await gateway.infer("free", {"x": raw(ONES)}), Reply)

    ask(work)


def test_a_question_that_takes_too_long_is_given_up(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narrowboat.serve.gateway._JUDGED", 0.5)
    block = {"load": "1us", "compute": "1us", "bytes": "4KB"}
    add = [{"name": f"t{k}", "blocks": [block] * 100, "period": f"{k * 7 + 101}ms"} for k in range(60)]

    async def work(gateway: LiveGateway) -> None:
        asked = [outcome(gateway.what_if({"add": add})) for _ in range(7)]  # type: ignore[arg-type]
        answers = await asyncio.gather(*asked)
        assert [type(answer) for answer in answers] == [TooLargeError] * 4 + [BeyondContractError] * 3
        await until(lambda: not [t for t in threading.enumerate() if t.name == "narrowboat-aside"])
        assert (await gateway.what_if({}))["admitted"]

    ask(work)


def test_weights_that_are_written_over_are_an_error_and_no_wrong_answer(nets: Path, plain: torch.nn.Module) -> None:
    weights = nets / "deep.safetensors"
    kept = weights.read_bytes()

    async def work(gateway: LiveGateway) -> None:
        least = (await gateway.what_if({"budget": "1MiB"}))["plan"]["needed_bytes"]
        await gateway.set_budget(least + (64 << 10))
        assert any(block["bytes"] for block in gateway.plan()["tasks"][0]["blocks"]), "some of it is read each time"
        weights.write_bytes(bytes(len(kept)))
        for _ in range(4):
            answer = await outcome(gateway.infer("free", {"x": raw(ONES)}))
            if isinstance(answer, Reply):  # from what was in memory
                with torch.inference_mode():
                    assert torch.equal(first(answer), plain(ONES))
            else:
                assert isinstance(answer, JobFailedError) and "was altered" in str(answer)
                assert str(nets) not in str(answer), "no path of this machine"
        assert isinstance(answer, JobFailedError)

    try:
        with_gateway(write(nets, FREE), work)
    finally:
        weights.write_bytes(kept)


def test_a_file_of_tasks_that_changed_is_told_and_can_be_read_again(nets: Path) -> None:
    file = write(nets, ASKED + FREE)

    async def work(gateway: LiveGateway) -> None:
        write(nets, ASKED + FREE, "75MiB")
        await gateway.unload("asked")
        with pytest.raises(TasksChangedError, match="has changed"):
            await gateway.load("asked")
        await gateway.reload()
        assert gateway.plan()["budget_bytes"] == 75 << 20 and gateway.face("asked").ready
        file.unlink()
        with pytest.raises(TasksChangedError, match="cannot read"):
            await gateway.load("asked")
        write(nets, ASKED + FREE, "1MiB")
        with pytest.raises((ConflictError, BadRequestError)):
            await gateway.reload()
        assert gateway.plan()["budget_bytes"] == 75 << 20
        assert isinstance(await gateway.infer("free", {"x": raw(ONES)}), Reply)

    with_gateway(file, work)


def test_tasks_that_do_not_hold_are_refused_before_anything_is_served(nets: Path) -> None:
    async def work(gateway: LiveGateway) -> None:
        raise AssertionError("it serves")

    with pytest.raises(AdmissionError):
        with_gateway(
            write(nets, ASKED.replace("period: 400ms", "period: 1us").replace("deadline: 400ms", "deadline: 2us")),
            work,
        )
