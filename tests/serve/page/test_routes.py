"""The page as one document, and what else it is made of."""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from narrowboat.serve.errors_http import install
from narrowboat.serve.page import document as documents
from narrowboat.serve.page.document import SCRIPTS, STYLES, document
from narrowboat.serve.page.routes import face_told, router
from serve_kit import FACES, FakeGateway


def get(path: str, gateway: FakeGateway | None = None, **asked: Any) -> Any:
    app = FastAPI()
    app.include_router(router(gateway or FakeGateway()))
    install(app)

    with TestClient(app) as client:
        return client.request(asked.pop("method", "GET"), path, **asked)


def test_the_page_is_one_document_whose_policy_names_its_script_and_style_alone() -> None:
    answer = get("/")
    html, policy = answer.text, answer.headers["content-security-policy"]
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy and "default-src 'none'" in policy


def test_the_page_fetches_nothing_and_has_no_inline_handlers_styles_or_markup_from_text() -> None:
    html = get("/").text
    shell = re.sub(r"<(script|style)>.*?</\1>", "", html, flags=re.DOTALL)
    assert not re.search(r"\s(on\w+|style)=", shell)
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", shell)
    assert not re.search(r"\b(eval|innerHTML|outerHTML|insertAdjacentHTML|document\.write|new Function)\b", html)
    assert not re.search(r"@import|url\(", html)
    addresses = set(re.findall(r"https?://[^\s'\"<>]+", html))
    assert addresses <= {"http://www.w3.org/2000/svg"}


def test_every_part_is_used_and_small() -> None:
    parts = {path.name: path.read_text("utf-8") for path in documents.PARTS.iterdir()}
    assert set(parts) == {"index.html", *SCRIPTS, *STYLES}
    assert max(text.count("\n") for text in parts.values()) <= 250
    assert all(parts[name].startswith("//") for name in SCRIPTS)


def test_an_unchanged_page_is_not_sent_again_and_gzip_is_the_same() -> None:
    plain = get("/", headers={"accept-encoding": "identity"})
    again = get("/", headers={"if-none-match": plain.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    packed = get("/", headers={"accept-encoding": "gzip"})
    assert packed.headers["content-encoding"] == "gzip" and packed.content == plain.content
    assert gzip.decompress(document().packed) == document().body
    assert get("/", method="HEAD").status_code == 200


def test_tasks_are_told_with_what_they_take_and_without_paths() -> None:
    told = {task["name"]: task for task in get("/v1/tasks").json()["tasks"]}
    assert set(told) == set(FACES)
    assert told["colours"]["takes"] == "image" and told["colours"]["labels"] == 3
    assert told["spare"]["ready"] is False and told["spare"]["reason"] == "not loaded"
    text = replace(FACES["identity"], facts={"tokenizer": "/there", "text": "causal"})
    assert face_told(text)["takes"] == "text" and "/there" not in str(face_told(text))
    embeds = replace(text, facts={"tokenizer": "/there", "text": "embedding"})
    assert face_told(embeds)["takes"] == "embedding"


def test_too_many_subscribers_are_told_when_to_come_back() -> None:
    answer = get("/v1/events", FakeGateway(subscribers=0))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


@pytest.mark.parametrize("module", ["routes", "trial", "images", "sse", "document"])
def test_the_page_needs_no_torch(module: str) -> None:
    code = f"import sys, narrowboat.serve.page.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
