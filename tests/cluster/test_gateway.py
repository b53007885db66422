"""The ingress over nodes that are slow, silent, dead, back, too small, of another version, or without the weights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from cluster_fake_kit import MIB, PACE, FakeCluster, FakeNode, X, describe, settings, until
from narrowboat.cluster.gateway import ClusterGateway, serving
from narrowboat.errors import (
    BadRequestError,
    BeyondContractError,
    ClusterError,
    ConflictError,
    ExpiredError,
    NoClusterError,
    NoSuchTaskError,
    NotServingError,
    PlacementError,
    TaskSpecError,
    UsageError,
)

SIZES = {"big": 60 * MIB, "mid": 40 * MIB, "small": 20 * MIB, "free": 10 * MIB}


def node(name: str, mib: int, **more: Any) -> FakeNode:
    return FakeNode(name, mib * MIB, more.pop("sizes", SIZES), **more)


def run(
    path: Path, cluster: FakeCluster, work: Callable[[ClusterGateway], Coroutine[Any, Any, None]], **more: Any
) -> list[str]:
    """Work with a deployment; what it said meanwhile."""
    said: list[str] = []

    async def go() -> None:
        async with asyncio.timeout(30), serving(settings(path, **more), cluster, said.append) as gateway:
            await work(gateway)

    asyncio.run(go())
    assert cluster.closed
    return said


def homes(gateway: ClusterGateway, task: str) -> list[str]:
    return [member.name for member in gateway.arrangement.homes(task)]


def test_tasks_go_where_they_fit_and_answers_count_the_way(tmp_path: Path) -> None:
    cluster = FakeCluster(node("a", 100), node("b", 50))

    async def work(gateway: ClusterGateway) -> None:
        assert homes(gateway, "big") == ["a"] and homes(gateway, "mid") == ["a"] and homes(gateway, "small") == ["b"]
        reply = await gateway.infer("big", X)
        assert bytes(reply.outputs[0][1].data) == b"12345678"
        face = gateway.face("big")
        assert face.bound == reply.bound == 5000 + gateway.allowed
        assert face.deadline == reply.deadline == 900_000
        assert reply.met and reply.response > 0

    run(describe(tmp_path, "big", "mid", "small"), cluster, work)
    assert cluster.nodes["a"].learned == cluster.nodes["b"].learned


def test_a_killed_node_s_tasks_move_and_its_requests_are_asked_again(tmp_path: Path) -> None:
    cluster = FakeCluster(node("a", 100, takes=0.3), node("b", 90))

    async def work(gateway: ClusterGateway) -> None:
        assert homes(gateway, "big") == ["a"]
        asked = asyncio.create_task(gateway.infer("big", X))
        await until(lambda: cluster.nodes["a"].jobs == 1)
        cluster.hidden.add("a")
        cluster.nodes["a"].dead = True
        with pytest.raises(NotServingError, match="being moved") as caught:
            await asked
        assert caught.value.retry_after == PACE.lost
        await until(lambda: homes(gateway, "big") == ["b"])
        assert (await gateway.infer("big", X)).met
        assert gateway.arrangement.moved == 1

    said = run(describe(tmp_path, "big"), cluster, work)
    assert any("big was moved to b" in line for line in said)


def test_what_no_other_node_can_take_is_refused_with_each_node_s_reason(tmp_path: Path) -> None:
    cluster = FakeCluster(node("a", 100), node("b", 30))

    async def work(gateway: ClusterGateway) -> None:
        cluster.hidden.add("a")
        cluster.nodes["a"].dead = True
        await until(lambda: "big" in gateway.arrangement.refused)
        with pytest.raises(NotServingError, match=r"no node takes it: big: .*b: .* MiB are needed") as caught:
            await gateway.infer("big", X)
        assert caught.value.retry_after is None, "to come again would not help"
        assert (await gateway.infer("small", X)).met, "the others go on"
        assert not gateway.plan()["admitted"]
        cluster.nodes["c"] = node("c", 70)
        await until(lambda: homes(gateway, "big") == ["c"])
        assert (await gateway.infer("big", X)).met and gateway.plan()["admitted"]

    run(describe(tmp_path, "big", "small"), cluster, work)


def test_no_request_hangs_when_a_node_falls_silent(tmp_path: Path) -> None:
    cluster = FakeCluster(node("a", 100), node("b", 20))

    async def work(gateway: ClusterGateway) -> None:
        cluster.nodes["a"].silent = True
        began = time.monotonic()
        told = await asyncio.gather(*(gateway.infer("big", X) for _ in range(10)), return_exceptions=True)
        assert time.monotonic() - began < PACE.lost + 1.0
        assert all(isinstance(answer, NotServingError) for answer in told)

    run(describe(tmp_path, "big"), cluster, work)


def test_a_node_that_was_only_silent_keeps_its_tasks(tmp_path: Path) -> None:
    cluster = FakeCluster(node("a", 100), node("b", 100))

    async def work(gateway: ClusterGateway) -> None:
        member = gateway.members["id-a"]
        cluster.nodes["a"].silent = True
        await until(lambda: member.state == "silent")
        cluster.nodes["a"].silent = False
        await until(lambda: member.state == "ready")
        assert homes(gateway, "big") == ["a"] and gateway.arrangement.moved == 0
        assert (await gateway.infer("big", X)).met

    run(describe(tmp_path, "big"), cluster, work)


def test_a_node_that_comes_back_after_its_tasks_moved_puts_them_down(tmp_path: Path) -> None:
    cluster = FakeCluster(node("a", 100), node("b", 100))

    async def work(gateway: ClusterGateway) -> None:
        cluster.nodes["a"].silent = True
        await until(lambda: homes(gateway, "big") == ["b"])
        cluster.nodes["a"].silent = False
        await until(lambda: gateway.members["id-a"].state == "ready")
        await until(lambda: cluster.nodes["a"].running == ())
        assert homes(gateway, "big") == ["b"], "nothing moves without need"

    said = run(describe(tmp_path, "big"), cluster, work)
    assert any("node a is back" in line for line in said)


def test_a_process_that_was_started_anew_gets_its_tasks_again(tmp_path: Path) -> None:
    cluster = FakeCluster(node("a", 100), node("b", 20))

    async def work(gateway: ClusterGateway) -> None:
        cluster.nodes["a"].born, cluster.nodes["a"].running = "another life", ()
        await until(lambda: cluster.nodes["a"].running == ("big",))
        assert (await gateway.infer("big", X)).met

    run(describe(tmp_path, "big"), cluster, work)


def test_time_in_which_the_ingress_itself_stood_still_is_no_node_s_silence(tmp_path: Path) -> None:
    cluster = FakeCluster(node("a", 100))

    async def work(gateway: ClusterGateway) -> None:
        await asyncio.sleep(0.1)
        time.sleep(PACE.lost * 2)
        await asyncio.sleep(0.1)
        assert gateway.members["id-a"].state == "ready" and homes(gateway, "big") == ["a"]

    said = run(describe(tmp_path, "big"), cluster, work)
    assert not any("lost" in line for line in said)


def test_a_cluster_too_small_is_refused_whole_and_nothing_is_left(tmp_path: Path) -> None:
    cluster = FakeCluster(node("a", 50), node("b", 30))

    async def work(gateway: ClusterGateway) -> None:
        raise AssertionError

    with pytest.raises(PlacementError, match=r"no node takes big: a: .*MiB are needed, b: .*--partial") as caught:
        run(describe(tmp_path, "big", "small"), cluster, work)
    assert set(caught.value.refusals["big"]) == {"a", "b"}
    assert cluster.nodes["a"].running == () and cluster.closed


def test_partial_deploys_the_others(tmp_path: Path) -> None:
    async def work(gateway: ClusterGateway) -> None:
        assert (await gateway.infer("small", X)).met
        assert not gateway.face("big").ready and "MiB are needed" in gateway.face("big").reason

    run(describe(tmp_path, "big", "small"), FakeCluster(node("a", 50)), work, partial=True)


def test_no_node_with_memory_says_how_to_start_one(tmp_path: Path) -> None:
    async def work(gateway: ClusterGateway) -> None:
        raise AssertionError

    with pytest.raises(NoClusterError, match=r"ray start .*narrowboat_memory"):
        run(describe(tmp_path, "big"), FakeCluster(), work)


def test_nodes_of_another_version_are_not_used_and_named(tmp_path: Path) -> None:
    other = node("b", 100, runs={"narrowboat": "9.9", "python": "3.11", "torch": "1.0"})
    cluster = FakeCluster(node("a", 100), other)

    async def work(gateway: ClusterGateway) -> None:
        member = gateway.members["id-b"]
        assert member.state == "refused" and "narrowboat 9.9 instead of" in member.said
        assert homes(gateway, "big") == ["a"]

    run(describe(tmp_path, "big"), cluster, work)


def test_if_no_node_can_be_used_each_one_s_reason_is_said(tmp_path: Path) -> None:
    cluster = FakeCluster(node("a", 100, runs={"narrowboat": "9.9"}))

    async def work(gateway: ClusterGateway) -> None:
        raise AssertionError

    with pytest.raises(ClusterError, match=r"a: its versions differ from the ingress: narrowboat 9\.9"):
        run(describe(tmp_path, "big"), cluster, work)


def test_weights_missing_on_a_node_keep_the_task_from_that_node_only(tmp_path: Path) -> None:
    cluster = FakeCluster(node("a", 200, sizes={"small": 20 * MIB}), node("b", 90))

    async def work(gateway: ClusterGateway) -> None:
        assert homes(gateway, "big") == ["b"] and homes(gateway, "small") == ["a"]
        cluster.hidden.add("b")
        cluster.nodes["b"].dead = True
        await until(lambda: "big" in gateway.arrangement.refused)
        assert "weights file not found" in gateway.arrangement.refused["big"]["a"]

    run(describe(tmp_path, "big", "small"), cluster, work)


def test_a_node_whose_weights_are_others_does_not_run_the_task(tmp_path: Path) -> None:
    cluster = FakeCluster(node("a", 300, weights="other"), node("b", 90), node("c", 80))

    async def work(gateway: ClusterGateway) -> None:
        assert homes(gateway, "big") == ["b"]
        assert "is not the one that b, c has" in gateway.members["id-a"].learned["big"]["reason"]

    run(describe(tmp_path, "big"), cluster, work)


def test_a_node_that_refuses_what_it_said_would_fit_is_passed_over(tmp_path: Path) -> None:
    cluster = FakeCluster(node("a", 200, refuses=frozenset({"big"})), node("b", 90))

    async def work(gateway: ClusterGateway) -> None:
        assert homes(gateway, "big") == ["b"]

    said = run(describe(tmp_path, "big"), cluster, work)
    assert any("a cannot take big: the executor could not be started" in line for line in said)


def test_best_effort_tasks_take_more_nodes_under_load_and_requests_are_spread(tmp_path: Path) -> None:
    cluster = FakeCluster(*(node(name, 50, takes=0.15) for name in "abc"))

    async def work(gateway: ClusterGateway) -> None:
        assert len(homes(gateway, "free")) == 1
        stop = time.monotonic() + 12

        async def client() -> None:
            while time.monotonic() < stop and len(homes(gateway, "free")) < 3:
                await gateway.infer("free", X)

        await asyncio.gather(*(client() for _ in range(12)))
        assert len(homes(gateway, "free")) == 3
        before = {name: cluster.nodes[name].jobs for name in "abc"}
        await asyncio.gather(*(gateway.infer("free", X) for _ in range(30)))
        assert all(cluster.nodes[name].jobs - before[name] == 10 for name in "abc")

    run(describe(tmp_path, free=["free"]), cluster, work)


def test_a_task_is_on_no_more_nodes_than_is_asked_for(tmp_path: Path) -> None:
    cluster = FakeCluster(*(node(name, 50, takes=0.1) for name in "ab"))

    async def work(gateway: ClusterGateway) -> None:
        for _ in range(30):
            await asyncio.gather(*(gateway.infer("free", X) for _ in range(8)))
        assert len(homes(gateway, "free")) == 1

    run(describe(tmp_path, free=["free"]), cluster, work, replicas=1)


def test_a_busy_replica_s_request_goes_to_another(tmp_path: Path) -> None:
    cluster = FakeCluster(node("a", 50), node("b", 50))

    async def work(gateway: ClusterGateway) -> None:
        assert await gateway.arrangement.more("free")
        cluster.nodes["a"].busy = True
        for _ in range(5):
            assert (await gateway.infer("free", X)).met
        cluster.nodes["b"].busy = True
        with pytest.raises(BeyondContractError):
            await gateway.infer("free", X)

    run(describe(tmp_path, free=["free"]), cluster, work)


def test_the_contract_is_kept_at_the_door(tmp_path: Path) -> None:
    async def work(gateway: ClusterGateway) -> None:
        told = await asyncio.gather(*(gateway.infer("small", X) for _ in range(30)), return_exceptions=True)
        beyond = [answer for answer in told if isinstance(answer, BeyondContractError)]
        assert 5 <= len(beyond) <= 10, "a burst of 20, and one more each 50 ms"
        assert all(error.retry_after for error in beyond)

    run(describe(tmp_path, "small"), FakeCluster(node("a", 50)), work)


def test_a_client_s_timeout_is_kept(tmp_path: Path) -> None:
    async def work(gateway: ClusterGateway) -> None:
        began = time.monotonic()
        with pytest.raises(ExpiredError):
            await gateway.infer("small", X, timeout=100_000)
        assert time.monotonic() - began < 1.0

    run(describe(tmp_path, "small"), FakeCluster(node("a", 50, takes=2.0)), work)


def test_tasks_are_unloaded_and_loaded_and_what_if_changes_nothing(tmp_path: Path) -> None:
    cluster = FakeCluster(node("a", 70))

    async def work(gateway: ClusterGateway) -> None:
        await gateway.unload("big")
        assert cluster.nodes["a"].running == () and gateway.face("big").reason == "it is not loaded"
        found = await gateway.what_if({"add": [{"name": "big"}]})
        assert found["admitted"] and found["plan"] == {"big": ["a"]}
        assert cluster.nodes["a"].running == () and "big" not in gateway.arrangement.wanted
        await gateway.load("big")
        assert cluster.nodes["a"].running == ("big",)
        with pytest.raises(NoSuchTaskError):
            await gateway.load("none")
        with pytest.raises(ConflictError, match="each node has its own budget"):
            await gateway.set_budget("1GiB")
        with pytest.raises(BadRequestError):
            await gateway.what_if({"budget": "1GiB"})

    run(describe(tmp_path, "big"), cluster, work)


def test_a_task_that_is_loaded_where_there_is_no_room_is_a_conflict_with_reasons(tmp_path: Path) -> None:
    async def work(gateway: ClusterGateway) -> None:
        with pytest.raises(ConflictError, match="MiB are needed"):
            await gateway.load("big")

    run(describe(tmp_path, "big", "small"), FakeCluster(node("a", 50)), work, partial=True)


def test_check_says_where_everything_would_go_and_starts_nothing(tmp_path: Path) -> None:
    cluster = FakeCluster(node("a", 70), node("b", 30))

    async def go() -> dict[str, Any]:
        gateway = ClusterGateway(settings(describe(tmp_path, "big", "small", "mid")), cluster, lambda said: None)
        try:
            return await gateway.check()
        finally:
            await gateway.close()

    found = asyncio.run(go())
    assert found["placement"] == {"big": ["a"], "small": ["b"], "mid": []}
    assert set(found["refused"]["mid"]) == {"a", "b"} and not found["admitted"]
    assert all(node.running == () for node in cluster.nodes.values())


def test_the_file_is_read_again(tmp_path: Path) -> None:
    cluster = FakeCluster(node("a", 100))

    async def work(gateway: ClusterGateway) -> None:
        describe(tmp_path, "mid", "small")
        await gateway.reload()
        assert set(cluster.nodes["a"].running) == {"mid", "small"}
        (tmp_path / "tasks.yaml").write_text("nonsense: 1")
        with pytest.raises(TaskSpecError):
            await gateway.reload()
        assert (await gateway.infer("mid", X)).met

    run(describe(tmp_path, "big"), cluster, work)


def test_ways_that_take_longer_than_is_promised_are_counted(tmp_path: Path) -> None:
    async def work(gateway: ClusterGateway) -> None:
        await gateway.infer("small", X)
        ingress = gateway.plan()["ingress"]
        assert ingress["allowed_us"] == 1500 and ingress["exceeded"] == 1 and ingress["longest_us"] >= 10_000

    run(describe(tmp_path, "small"), FakeCluster(node("a", 50, takes=0.02)), work, ingress=1500)


def test_tasks_described_by_blocks_cannot_be_deployed(tmp_path: Path) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text("budget: 1MiB\ntasks:\n  - {name: t, blocks: [{compute: 1ms}], period: 10ms}\n")
    with pytest.raises(TaskSpecError, match="without a model"):
        ClusterGateway(settings(path), FakeCluster(), lambda said: None)


def test_times_that_make_no_sense_are_refused() -> None:
    from narrowboat.cluster.settings import Pace

    with pytest.raises(UsageError, match="have to grow"):
        Pace(silent=30.0)
