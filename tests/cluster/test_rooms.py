"""What a cluster answers over HTTP: the protocols of one machine, the plan of all nodes, and a page."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

from starlette.testclient import TestClient

from cluster_fake_kit import MIB, FakeCluster, FakeNode, describe, settings
from narrowboat.cluster.gateway import serving
from narrowboat.cluster.rooms import cluster_page, make_cluster_rooms
from narrowboat.serve.settings import ServeSettings


def asked(tmp_path: Path, work: Callable[[TestClient], None]) -> None:
    path = describe(tmp_path, "big", "small")
    cluster = FakeCluster(FakeNode("a", 50 * MIB, {"big": 60 * MIB, "small": 20 * MIB}))

    async def go() -> None:
        async with serving(settings(path, partial=True), cluster) as gateway:
            client = TestClient(make_cluster_rooms(gateway, ServeSettings(path)))
            await asyncio.to_thread(work, client)

    asyncio.run(go())


def test_protocols_plan_and_refusals(tmp_path: Path) -> None:
    def work(client: TestClient) -> None:
        assert client.get("/v2/models/small/ready").status_code == 200
        assert client.get("/v2/models/big/ready").status_code == 503
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "data": [1.0, 2.0]}]}
        answer = client.post("/v2/models/small/infer", json=body)
        assert answer.status_code == 200 and answer.json()["outputs"][0]["data"] == [1.0, 2.0]
        assert answer.json()["parameters"]["bound_us"] > 5000
        refused = client.post("/v2/models/big/infer", json=body)
        assert refused.status_code == 503 and "a: 60 MiB are needed" in refused.json()["error"]
        plan = client.get("/v1/plan").json()
        assert [node["name"] for node in plan["nodes"]] == ["a"] and not plan["admitted"]
        assert client.put("/v1/budget", json={"budget": "1GiB"}).status_code == 409
        question = client.post("/v1/admission", json={"add": [{"name": "big"}]})
        assert question.status_code == 200 and not question.json()["admitted"]
        assert client.get("/v1/trace").status_code == 404
        assert client.get("/metrics").status_code == 200
        assert client.post("/v2/repository/models/big/load", json={}).status_code == 409
        assert client.post("/v2/repository/models/small/unload", json={}).status_code == 200
        assert client.get("/v2/models/small/ready").status_code == 503

    asked(tmp_path, work)


def test_the_page_fetches_nothing_from_elsewhere_and_finds_all_that_its_script_names(tmp_path: Path) -> None:
    page = cluster_page()
    text = page.body.decode()
    assert "script-src 'sha256-" in page.policy and "http://" not in re.sub(r"http://www\.w3\.org/\S+", "", text)
    named = set(re.findall(r'byId\("([a-z-]+)"\)', text.split("// cluster.js")[1]))
    assert named and all(f'id="{name}"' in text for name in named)

    def work(client: TestClient) -> None:
        answer = client.get("/")
        assert answer.status_code == 200 and "narrowboat cluster" in answer.text
        assert client.get("/", headers={"if-none-match": page.etag}).status_code == 304

    asked(tmp_path, work)
