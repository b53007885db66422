"""The table of rights."""

from __future__ import annotations

import pytest

from narrowboat.serve.guard.rights import right_for


@pytest.mark.parametrize(
    ("method", "path", "right"),
    [
        ("GET", "/", "open"),
        ("HEAD", "/", "open"),
        ("GET", "/openapi.json", "open"),
        ("GET", "/v2/health/live", "open"),
        ("GET", "/v2/health/ready", "open"),
        ("POST", "/", "use"),
        ("GET", "/v2", "use"),
        ("GET", "/metrics", "use"),
        ("GET", "/v1/events", "use"),
        ("GET", "/v1/plan", "use"),
        ("POST", "/v1/admission", "use"),
        ("POST", "/v2/models/m/infer", "use"),
        ("POST", "/v2/repository/index", "use"),
        ("GET", "/nowhere", "use"),
        ("GET", "/v2/health/live/x", "use"),
        ("GET", "/v2/health/live\n", "use"),
        ("PUT", "/v1/budget", "admin"),
        ("PUT", "/v1/budget/", "admin"),
        ("GET", "/v1/budget", "use"),
        ("POST", "/v2/repository/models/m/load", "admin"),
        ("POST", "/v2/repository/models/m/unload", "admin"),
        ("POST", "/v2/repository/models/a/b/load", "admin"),
        ("POST", "/v2/repository/models/a\nb/unload", "admin"),
        ("POST", "/v2/repository/models/../load", "admin"),
        ("POST", "/v2/repository/models/m/load/", "admin"),
        ("DELETE", "/v2/repository/models/m/load", "admin"),
    ],
)
def test_each_path_needs_its_right(method: str, path: str, right: str) -> None:
    assert right_for(method, path) == right
