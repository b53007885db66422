"""One server for the room's tests, and OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from serve_openai_kit import Talk, app_of, served


@pytest.fixture(scope="module")
def _talk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talk]:
    talk = Talk(tmp_path_factory.mktemp("talk"))
    with served(app_of(talk.gateway)) as talk.url:
        yield talk


@pytest.fixture
def talk(_talk: Talk) -> Talk:
    """A gateway behind a server; what was asked of it before is forgotten."""
    _talk.gateway.asked.clear()
    _talk.gateway.delay("talk", 0)
    return _talk


@pytest.fixture
def client(talk: Talk) -> Iterator[openai.OpenAI]:
    """The stock client, which does not try again."""
    with openai.OpenAI(base_url=f"{talk.url}/v1", api_key="x", max_retries=0, timeout=20) as made:
        yield made
