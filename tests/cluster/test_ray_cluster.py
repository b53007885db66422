"""Joining a Ray cluster that does not let us in."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from narrowboat.cluster import ray_cluster
from narrowboat.cluster.ray_cluster import RayCluster
from narrowboat.errors import NoClusterError

ray = pytest.importorskip("ray", reason="several machines need narrowboat[ray]")


def test_a_cluster_that_wants_a_token_says_where_it_has_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import AuthenticationError

    def refuses(**_: Any) -> None:
        raise AuthenticationError("InvalidAuthToken")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuses)
    with pytest.raises(NoClusterError, match=r"does not let us in.*RAY_AUTH_MODE=token.*auth_token"):
        asyncio.run(RayCluster("head").connect())


def test_a_cluster_that_goes_on_saying_no_is_given_up_and_the_token_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def insists(**_: Any) -> None:
        over.wait(30.0)
        raise ConnectionError("given up")

    monkeypatch.setattr(ray_cluster, "_CONNECT", 0.05)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", insists)
    try:
        with pytest.raises(NoClusterError, match=r"within 0.05 s.*RAY_AUTH_MODE=token"):
            asyncio.run(RayCluster("head").connect())
    finally:
        over.set()
