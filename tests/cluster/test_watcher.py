"""Nodes that are cut off in the middle of something, and what they run when they are heard again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster_fake_kit import MIB, PACE, FakeCluster, FakeNode, X, describe, settings, until
from narrowboat.cluster.gateway import ClusterGateway, serving
from narrowboat.errors import ConflictError, TaskSpecError

SIZES = {"big": 60 * MIB, "free": 10 * MIB}
LONG = replace(PACE, start=60.0)  # a node may take long to start; a test may not


def run(path: Path, cluster: FakeCluster, work: Callable[[ClusterGateway], Coroutine[Any, Any, None]]) -> list[str]:
    """Work with a deployment; what it said meanwhile."""
    said: list[str] = []

    async def go() -> None:
        async with asyncio.timeout(30), serving(settings(path, pace=LONG), cluster, said.append) as gateway:
            await work(gateway)

    asyncio.run(go())
    return said


def homes(gateway: ClusterGateway, task: str) -> list[str]:
    return [member.name for member in gateway.arrangement.homes(task)]


@dataclass
class CutWhileItLearns(FakeNode):
    """Its cable is cut when it is asked what tasks cost."""

    cut: bool = True

    async def _learn(self, description: Mapping[str, Any], folder: str, allowed: int) -> dict[str, Any]:
        if self.cut:
            self.silent = True
            await asyncio.Event().wait()
        return await super()._learn(description, folder, allowed)


@dataclass
class Stuck(FakeNode):
    """The first time it is to put its tasks down it cannot."""

    stuck: bool = True

    async def _put(self, names: Sequence[str]) -> dict[str, Any]:
        if not names and self.stuck:
            self.stuck = False
            raise ConflictError("not now")
        return await super()._put(names)


@dataclass
class Bare(FakeNode):
    """Its tasks' file is no use any more."""

    bare: bool = False

    async def _learn(self, description: Mapping[str, Any], folder: str, allowed: int) -> dict[str, Any]:
        if self.bare:
            raise TaskSpecError("nothing is here")
        return await super()._learn(description, folder, allowed)


def test_a_node_cut_while_it_is_asked_keeps_no_other_s_tasks_from_moving(tmp_path: Path) -> None:
    cluster = FakeCluster(*(FakeNode(name, mib * MIB, SIZES) for name, mib in (("a", 100), ("b", 90), ("c", 80))))

    async def work(gateway: ClusterGateway) -> None:
        assert homes(gateway, "big") == ["a"] and homes(gateway, "free") == ["b"]
        cluster.nodes["c"].silent = True
        asked = asyncio.create_task(gateway.arrangement.more("free"))
        await until(gateway.arrangement.changing)
        cluster.hidden.add("a")
        cluster.nodes["a"].dead = True
        await until(lambda: homes(gateway, "big") == ["b"], 5.0)
        assert not await asked

    run(describe(tmp_path, "big", free=["free"]), cluster, work)


def test_a_node_cut_while_it_comes_in_is_tried_again(tmp_path: Path) -> None:
    cluster = FakeCluster(FakeNode("a", 100 * MIB, SIZES))

    async def work(gateway: ClusterGateway) -> None:
        late = cluster.nodes["b"] = CutWhileItLearns("b", 100 * MIB, SIZES)
        await until(lambda: "id-b" in gateway.members and gateway.members["id-b"].state == "refused", 5.0)
        assert "has not answered" in gateway.members["id-b"].said
        late.cut = late.silent = False
        await until(lambda: gateway.members["id-b"].state == "ready", 5.0)

    run(describe(tmp_path, "big"), cluster, work)


def test_a_node_that_runs_what_it_was_not_given_puts_it_down(tmp_path: Path) -> None:
    cluster = FakeCluster(FakeNode("a", 100 * MIB, SIZES), FakeNode("b", 100 * MIB, SIZES))

    async def work(gateway: ClusterGateway) -> None:
        cluster.nodes["b"].running = ("big",)  # by a question whose answer never came
        await until(lambda: cluster.nodes["b"].running == (), 5.0)
        assert homes(gateway, "big") == ["a"] and (await gateway.infer("big", X)).met

    run(describe(tmp_path, "big"), cluster, work)


def test_a_node_that_put_its_tasks_down_is_given_them_again_without_measuring(tmp_path: Path) -> None:
    cluster = FakeCluster(FakeNode("a", 100 * MIB, SIZES))

    async def work(gateway: ClusterGateway) -> None:
        measured = list(cluster.nodes["a"].learned)
        cluster.nodes["a"].running = ()
        await until(lambda: cluster.nodes["a"].running == ("big",), 5.0)
        assert cluster.nodes["a"].learned == measured and gateway.arrangement.moved == 0

    run(describe(tmp_path, "big"), cluster, work)


def test_questions_to_a_node_that_was_given_up_do_not_keep_its_lease(tmp_path: Path) -> None:
    cluster = FakeCluster(FakeNode("a", 100 * MIB, SIZES), FakeNode("b", 100 * MIB, SIZES))

    async def work(gateway: ClusterGateway) -> None:
        cluster.nodes["a"].late = 4 * PACE.lost  # it hears everything, and is heard too late
        await until(lambda: homes(gateway, "big") == ["b"])
        await until(lambda: not cluster.nodes["a"].kept, 5.0)
        cluster.nodes["a"].late = 0.0
        await until(lambda: gateway.members["id-a"].state == "ready")
        await until(lambda: cluster.nodes["a"].kept and not cluster.nodes["a"].running, 5.0)
        assert homes(gateway, "big") == ["b"], "and nothing is moved back"

    run(describe(tmp_path, "big"), cluster, work)


def test_a_node_that_is_back_is_given_nothing_before_it_has_put_down_what_it_ran(tmp_path: Path) -> None:
    cluster = FakeCluster(Stuck("a", 100 * MIB, SIZES), FakeNode("b", 100 * MIB, SIZES))

    async def work(gateway: ClusterGateway) -> None:
        cluster.nodes["a"].silent = True
        await until(lambda: homes(gateway, "big") == ["b"])
        cluster.nodes["a"].silent = False
        await until(lambda: gateway.members["id-a"].state == "ready")
        assert cluster.nodes["a"].running == () and homes(gateway, "big") == ["b"]

    said = run(describe(tmp_path, "big"), cluster, work)
    assert any("node a is lost again: it did not put down what it ran: not now" in line for line in said)


def test_what_finds_no_place_when_its_node_is_lost_is_told_once(tmp_path: Path) -> None:
    cluster = FakeCluster(FakeNode("a", 100 * MIB, SIZES), FakeNode("b", 20 * MIB, SIZES))

    async def work(gateway: ClusterGateway) -> None:
        cluster.hidden.add("a")
        cluster.nodes["a"].dead = True
        await until(lambda: "big" in gateway.arrangement.refused)
        cluster.hidden.add("b")
        cluster.nodes["b"].dead = True
        await until(lambda: gateway.members["id-b"].state == "lost")

    said = run(describe(tmp_path, "big"), cluster, work)
    assert sum("no node takes big" in line and "are needed" in line for line in said) == 1


def test_the_tasks_of_a_node_that_cannot_be_used_any_more_move(tmp_path: Path) -> None:
    cluster = FakeCluster(Bare("a", 100 * MIB, SIZES), FakeNode("b", 100 * MIB, SIZES))

    async def work(gateway: ClusterGateway) -> None:
        node = cluster.nodes["a"]
        assert isinstance(node, Bare) and homes(gateway, "big") == ["a"]
        node.bare, node.born, node.running = True, "another life", ()
        await until(lambda: homes(gateway, "big") == ["b"], 5.0)
        assert gateway.members["id-a"].state == "refused" and "nothing is here" in gateway.members["id-a"].said

    run(describe(tmp_path, "big"), cluster, work)
