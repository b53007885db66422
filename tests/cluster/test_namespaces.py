"""A deployment on machines that have networks of their own: cables cut, slow, one way only; machines that stand still.

The kernel's netem is not asked for: a cable's delay is made by ``cluster_wire_kit``.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster_driver_kit import Driver
from cluster_namespace_kit import Hosts, hosts, why_not_allowed
from narrowboat.cluster.settings import MEMORY, NAME
from task_nets_kit import nets  # noqa: F401

pytest.importorskip("ray", reason="several machines need narrowboat[ray]")
_WHY_NOT = why_not_allowed()
pytestmark = [pytest.mark.timeout(600), pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT or "allowed")]

MIB = 1 << 20
PACE = {"beat": 0.5, "silent": 3.0, "lost": 6.0, "lease": 10.0, "patience": 8.0, "start": 120.0}
SLOW = 0.05  # seconds of delay of n3's cable at the start, each way
TASKS = """\
budget: 1MiB
margin: 2
calibration: 100ms
tasks:
  - {name: asked, model: "tasks_test_nets:other", weights: other.safetensors, input: {queue: q},
     contract: {burst: 20, period: 500ms}, deadline: 10s}
  - {name: free, model: "tasks_test_nets:deep", weights: deep.safetensors, input: {queue: q},
     contract: {burst: 2000, period: 5ms}, deadline: 8s, guarantee: best-effort}
"""
BUDGETS = {"n1": 80 * MIB, "n2": 70 * MIB, "n3": 60 * MIB}
WIDTH = {"asked": 128, "free": 256}


class Deployment:
    """The machines, and the driver on the head."""

    def __init__(self, made: Hosts, driver: Driver, plan: dict[str, Any]) -> None:
        self.hosts, self.driver, self.plan = made, driver, plan

    def infer(self, task: str, seconds: float = 30.0, **more: Any) -> dict[str, Any]:
        """One request."""
        return self.driver.ask("infer", seconds, task=task, width=WIDTH[task], **more)

    def until(self, condition: Callable[[], Any], seconds: float, what: str) -> float:
        """Wait for it; how long it took."""
        began = time.monotonic()
        while not condition():
            told = "\n".join(said for _, said in self.driver.said[-20:])
            assert time.monotonic() - began < seconds, f"{what} within {seconds:g} s: {self.driver.members()}\n{told}"
            time.sleep(0.2)
        return time.monotonic() - began

    def answers(self, task: str, digest: str, seconds: float = 60.0) -> None:
        """In the end, and with the right bits."""

        def answered() -> bool:
            told = self.infer(task)
            assert told["outcome"] in ("answered", "NotServingError", "BeyondContractError", "ExpiredError"), told
            assert told.get("digest", digest) == digest
            return bool(told["outcome"] == "answered")

        self.until(answered, seconds, f"{task} answers")


@pytest.fixture(scope="module")
def digests(nets: Path) -> dict[str, str]:  # noqa: F811
    """Of the right answers."""
    import tasks_test_nets  # type: ignore[import-not-found]

    found = {}
    for task, net in (("asked", "other"), ("free", "deep")):
        torch.manual_seed(len(net))
        with torch.inference_mode():
            told = getattr(tasks_test_nets, net)()(torch.ones(1, WIDTH[task])).numpy().tobytes()
        found[task] = hashlib.sha256(told).hexdigest()
    return found


@pytest.fixture(scope="module")
def deployment(nets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:  # noqa: F811
    """A head and three nodes; the cable of n3 is slow."""
    (nets / "tasks.yaml").write_text(TASKS)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment["RAY_AUTH_MODE"] = "disabled"  # a token that somebody keeps at home is nothing to these machines
    environment["PYTHONPATH"] = os.pathsep.join([str(nets), str(Path(__file__).resolve().parents[1])])
    with hosts(tmp_path_factory.mktemp("ns"), ["head", *BUDGETS], environment) as made:
        address = made.start_head("head")
        for name, budget in BUDGETS.items():
            made.start_node(name, address, {MEMORY: budget}, NAME)
        made.delay("n3", SLOW)
        told = {"tasks": str(nets / "tasks.yaml"), "address": address, "pace": PACE, "replicas": 1, "nodes": 3}
        driver = made.drive("head", told)
        plan = driver.ready(200.0)["ready"]
        yield Deployment(made, driver, plan)
        assert driver.end(60.0) == 0
        until = time.monotonic() + 20.0
        while left := sum(host.executors() for host in made.by_name.values()):
            assert time.monotonic() < until, f"{left} executors are left"
            time.sleep(0.2)


def test_tasks_are_placed_on_machines_with_addresses_and_a_slow_cable_is_allowed_for(
    deployment: Deployment, digests: dict[str, str]
) -> None:
    members = deployment.driver.members()
    for name in BUDGETS:
        assert members[name]["state"] == "ready"
        assert members[name]["address"] == deployment.hosts.by_name[name].address
    assert deployment.plan["admitted"]
    assert deployment.driver.homes("asked") == ["n1"], ("the largest is tried first", members)
    allowed = deployment.plan["ingress"]["allowed_us"]
    assert allowed >= 2 * SLOW * 1e6, "the slowest way is what is allowed"
    for task in WIDTH:
        told = deployment.infer(task)
        assert told["outcome"] == "answered" and told["digest"] == digests[task] and told["met"]
    assert deployment.infer("asked")["bound"] > allowed


def test_a_cable_that_becomes_slow_is_counted_and_answers_do_not_lie(
    deployment: Deployment, digests: dict[str, str]
) -> None:
    deployment.hosts.mend("n3")
    deployment.answers("asked", digests["asked"])
    before = deployment.driver.ask("plan")["plan"]["ingress"]
    slow = before["allowed_us"] / 1e6 / 2 + 0.1  # each way, so that both together are more than what is allowed
    deployment.hosts.delay("n1", slow)
    told = [deployment.infer("asked") for _ in range(3)]
    answered = [one for one in told if one["outcome"] == "answered"]
    assert {one["outcome"] for one in told} <= {"answered", "NotServingError", "ExpiredError"}
    deployment.until(
        lambda: answered or _answered(deployment.infer("asked"), answered), 30.0, "an answer over the slow cable"
    )
    for one in answered:
        assert one["digest"] == digests["asked"]
        assert one["response"] >= 2 * slow * 1e6, "the way is in the time that is told"
        assert one["met"] == (one["response"] <= one["deadline"])
    hurried = deployment.infer("asked", timeout=round(slow * 1e6))
    assert hurried["outcome"] == "ExpiredError" and hurried["seconds"] < 2 * slow
    after = deployment.driver.ask("plan")["plan"]["ingress"]
    assert after["exceeded"] >= before["exceeded"] + len(answered)
    assert after["longest_us"] > after["allowed_us"] == before["allowed_us"]
    deployment.hosts.mend("n1")
    deployment.until(lambda: deployment.driver.members()["n1"]["state"] == "ready", 30.0, "n1 is ready")
    assert deployment.driver.homes("asked") == ["n1"], "a slow cable moves nothing"


def _answered(told: dict[str, Any], answered: list[dict[str, Any]]) -> bool:
    if told["outcome"] == "answered":
        answered.append(told)
    return bool(answered)


def test_what_a_machine_behind_a_cut_cable_ran_moves_and_is_not_run_twice_when_it_is_mended(
    deployment: Deployment, digests: dict[str, str]
) -> None:
    home = _home(deployment, "asked")
    identity = deployment.driver.members()[home]["identity"]
    assert deployment.hosts.by_name[home].executors() > 0
    deployment.hosts.cut(home)
    cut = time.monotonic()
    under_way = [deployment.driver.later("infer", task="asked", width=WIDTH["asked"]) for _ in range(5)]
    longest, outcomes = 0.0, set()
    while deployment.driver.homes("asked") in ([home], []) and time.monotonic() - cut < 90:
        told = deployment.infer("asked", PACE["patience"] + 5)
        longest = max(longest, told["seconds"])
        outcomes.add(told["outcome"])
        time.sleep(0.1)
    told = [one.result(PACE["patience"] + 5) for one in under_way]
    assert {one["outcome"] for one in told} | outcomes <= {"answered", "NotServingError", "ExpiredError"}
    assert max(longest, *(one["seconds"] for one in told)) < PACE["patience"] + 2, "no request hangs"
    assert deployment.driver.homes("asked") not in ([home], [])
    deployment.answers("asked", digests["asked"])
    # Behind the cut nobody is heard any more either: by the lease nothing runs there.
    left = max(PACE["lease"] + 10 - (time.monotonic() - cut), 1.0)
    deployment.until(lambda: deployment.hosts.by_name[home].executors() == 0, left, f"{home} puts its tasks down")

    deployment.hosts.mend(home)
    deployment.until(lambda: deployment.driver.members()[home]["state"] == "ready", 60.0, f"{home} is back")
    assert deployment.driver.members()[home]["identity"] == identity, "Ray has not given it up"
    assert home not in deployment.driver.homes("asked"), "nothing moves without need"
    _runs_once(deployment)
    deployment.answers("asked", digests["asked"])


def test_a_cable_that_carries_requests_and_no_answers_is_a_cut_one(
    deployment: Deployment, digests: dict[str, str]
) -> None:
    home = _home(deployment, "asked")
    deployment.hosts.delay(home, 0.0, "back")  # what others send arrives; what it says does not
    began = time.monotonic()
    told = deployment.infer("asked", PACE["patience"] + 5)
    assert told["outcome"] in ("NotServingError", "ExpiredError") and told["seconds"] < PACE["patience"] + 2
    deployment.until(lambda: deployment.driver.homes("asked") not in ([home], []), 60.0, "asked is moved")
    left = max(PACE["lost"] + PACE["lease"] + 15 - (time.monotonic() - began), 1.0)
    deployment.until(lambda: deployment.hosts.by_name[home].executors() == 0, left, f"{home} puts its tasks down")
    deployment.answers("asked", digests["asked"])
    deployment.hosts.mend(home)
    deployment.until(lambda: deployment.driver.members()[home]["state"] == "ready", 60.0, f"{home} is back")
    _runs_once(deployment)


def test_a_machine_that_stands_still_half_of_the_time_gives_right_answers_or_is_passed_over(
    deployment: Deployment, digests: dict[str, str]
) -> None:
    home = _home(deployment, "asked")
    deployment.hosts.limp(home, 0.3)
    try:
        told = [deployment.infer("asked", PACE["patience"] + 5) for _ in range(8)]
        assert deployment.driver.members()[home]["state"] in ("ready", "silent")
    finally:
        deployment.hosts.walk(home)
    answered = [one for one in told if one["outcome"] == "answered"]
    assert answered and {one["digest"] for one in answered} == {digests["asked"]}
    assert {one["outcome"] for one in told} <= {"answered", "NotServingError", "ExpiredError", "BeyondContractError"}
    assert max(one["seconds"] for one in told) < PACE["patience"] + 2
    assert max(one["response"] for one in answered) > 50_000, "it did stand still"
    deployment.until(lambda: deployment.driver.members()[home]["state"] == "ready", 30.0, f"{home} is ready")
    deployment.answers("asked", digests["asked"])


def test_an_ingress_cut_from_all_machines_says_so_and_recovers(
    deployment: Deployment, digests: dict[str, str]
) -> None:
    driver = deployment.driver
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 128], "data": [1.0] * 128}]}
    asked = {"path": "/v2/models/asked/infer", "body": body}
    assert driver.ask("http", **asked)["status"] == 200
    deployment.hosts.cut("head")
    cut = time.monotonic()
    told = driver.ask("http", PACE["patience"] + 5, **asked)
    assert told["status"] in (503, 504)
    deployment.until(
        lambda: {member["state"] for member in driver.members().values()} == {"lost"}, 60.0, "all are lost"
    )
    told = driver.ask("http", 5.0, **asked)
    assert told["status"] == 503 and "lost" in str(told["body"])
    assert not driver.ask("plan")["plan"]["admitted"]
    left = max(PACE["lease"] + 10 - (time.monotonic() - cut), 1.0)
    deployment.until(
        lambda: not any(host.executors() for host in deployment.hosts.by_name.values()), left, "all put down"
    )
    deployment.hosts.mend("head")
    deployment.until(
        lambda: {member["state"] for member in driver.members().values()} == {"ready"}, 90.0, "all are back"
    )
    for task in WIDTH:
        deployment.answers(task, digests[task])
    assert driver.ask("http", **asked)["status"] == 200
    assert driver.ask("plan")["plan"]["admitted"]
    _runs_once(deployment)


def _home(deployment: Deployment, task: str) -> str:
    deployment.until(lambda: len(deployment.driver.homes(task)) == 1, 60.0, f"{task} has a home")
    (home,) = deployment.driver.homes(task)
    return home


def _runs_once(deployment: Deployment) -> None:
    """Machines run what the ingress believes, after a moment: executors where tasks are, and nowhere else."""

    def agrees() -> bool:
        members = deployment.driver.members()
        return all(
            bool(members[name]["tasks"]) == bool(deployment.hosts.by_name[name].executors()) for name in BUDGETS
        )

    deployment.until(agrees, 30.0, "what runs is what was given")
    for task in WIDTH:
        assert len(deployment.driver.homes(task)) == 1
