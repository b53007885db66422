"""Sockets and descriptors."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from narrowboat.errors import ServeError
from narrowboat.serve.guard.listeners import allow_descriptors, bind
from serve_guard_kit import logged

CODE = """
import resource
from narrowboat.serve.guard.listeners import allow_descriptors
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
allow_descriptors(200)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def test_the_limit_of_open_files_is_raised_to_hold_all_connections() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    done = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True, timeout=60)
    assert int(done.stdout) == (712 if hard == resource.RLIM_INFINITY else min(712, hard))


def test_a_limit_that_cannot_be_raised_is_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 128))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: None)
    with logged() as said:
        allow_descriptors(1000)
    assert '"few descriptors"' in said.getvalue()


def test_a_port_that_needs_more_rights_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    class Refusing(socket.socket):
        def bind(self, address: object) -> None:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket, "socket", Refusing)
    with pytest.raises(ServeError, match="1024"):
        bind(socket.AF_INET, "127.0.0.1", 80, option="--port")
