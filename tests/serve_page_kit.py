"""The live page in a browser: a server in this process, a browser, and screenshots.

``shoot(url, folder)`` is also for a real gateway: it takes the documentation's pictures of whatever runs there.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import shutil
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, Request, Response
from starlette.responses import StreamingResponse

T = TypeVar("T")
PHONE = {"width": 360, "height": 740}
DESKTOP = {"width": 1440, "height": 900}


def browser_path() -> str | None:
    """Of Debian's browser; None where there is none."""
    return shutil.which("chromium")


@contextlib.contextmanager
def launched() -> Iterator[Any]:
    """A browser without a screen."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        yield browser
        browser.close()


def shoot(url: str, folder: str | Path, *, seconds: float = 3.0, token: str = "") -> list[Path]:
    """Pictures of a page that runs: desktop light and dark, phone.

    Args:
        url: of the gateway, e.g. ``http://127.0.0.1:8000/``.
        folder: in which ``page-light.png``, ``page-dark.png`` and ``page-phone.png`` are written.
        seconds: to watch before each; a minute fills the chart of memory.
        token: to log in with, if the gateway wants one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    with launched() as browser:
        for name, size, scheme in (
            ("page-light", DESKTOP, "light"),
            ("page-dark", DESKTOP, "dark"),
            ("page-phone", PHONE, "light"),
        ):
            context = browser.new_context(viewport=size, color_scheme=scheme)
            if token:
                keep = f"sessionStorage.setItem('narrowboat-token', {json.dumps(token)})"
                context.add_init_script(keep)
            page = context.new_page()
            page.goto(url)
            page.wait_for_selector("#gateway-state[data-is=good]")
            page.wait_for_timeout(seconds * 1000)
            # Charts are drawn when they are seen: a window as tall as the page sees them all.
            page.set_viewport_size({**size, "height": page.evaluate("document.documentElement.scrollHeight")})
            page.wait_for_timeout(1_200)
            made.append(folder / f"{name}.png")
            page.screenshot(path=made[-1], full_page=True)
            context.close()
    return made


def pictures() -> dict[str, bytes]:
    """Photographs of scikit-image, as PNG files by their labels."""
    from PIL import Image
    from skimage import data

    found = {}
    for label, array in (("tabby cat", data.cat()), ("astronaut", data.astronaut()), ("coffee mug", data.coffee())):
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG")
        found[label] = file.getvalue()
    return found


def page_app(gateway: Any) -> Any:
    """The page's room beside the protocol's and the plan's, and what else the page asks for, made up.

    ``gateway.token``, if it is set, is wanted for everything but the page itself.
    """
    from narrowboat.serve.admin.routes import router as admin
    from narrowboat.serve.errors_http import install
    from narrowboat.serve.oip.routes import router as oip
    from narrowboat.serve.page.routes import router as page

    app = FastAPI(openapi_url=None)
    for router in (page, oip, admin):
        app.include_router(router(gateway))
    install(app)

    @app.get("/v1/guarantee")
    async def guarantee() -> dict[str, Any]:
        broken = getattr(gateway, "broken", [])
        return {"valid": not broken, "valid_since_start": not broken, "broken": broken, "jobs": 412, "missed": 0}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = orjson.loads(await request.body())

        async def words() -> AsyncIterator[bytes]:
            for word in ("a", "boat", "that", "fits")[: asked["max_tokens"]]:
                yield b"data: " + orjson.dumps({"choices": [{"text": " " + word}]}) + b"\n\n"
                await asyncio.sleep(0.01)
            told = {"admitted": False, "bound_us": None, "deadline_us": 900_000, "worst_response_us": 71_000}
            last = {"choices": [{"text": ""}], "narrowboat": {**told, "missed": 0, "jobs": 4}}
            yield b"data: " + orjson.dumps(last) + b"\n\ndata: [DONE]\n\n"

        return StreamingResponse(words(), media_type="text/event-stream")

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        token = getattr(gateway, "token", "")
        given = dict(scope.get("headers", ())).get(b"authorization")
        if scope["type"] == "http" and token and scope["path"] != "/" and given != b"Bearer " + token.encode():
            refused = Response(b'{"error": "a token is wanted", "type": "UnauthorizedError"}', 401)
            return await refused(scope, receive, send)
        return await app(scope, receive, send)

    return guarded


class LiveServer:
    """A server on a port of the kernel's choice, in a thread; ``call`` runs functions where the gateway lives.

    Args:
        make: of the gateway; called in the server's own event loop.
        run: a coroutine function of the gateway that goes on beside the server, such as ticks.
    """

    def __init__(self, make: Callable[[], Any], run: Callable[[Any], Any]) -> None:
        self._make, self._run = make, run
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    async def _serve(self) -> None:
        import uvicorn

        self._loop = asyncio.get_running_loop()
        self.gateway = self._make()
        config = uvicorn.Config(page_app(self.gateway), host="127.0.0.1", port=0, log_level="error", lifespan="off")
        self._server = uvicorn.Server(config)
        serving, running = asyncio.ensure_future(self._server.serve()), asyncio.ensure_future(self._run(self.gateway))
        while not self._server.started and not serving.done():
            await asyncio.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}/"
        self._ready.set()
        await serving
        running.cancel()

    def call(self, function: Callable[[Any], T]) -> T:
        """``function(gateway)`` in the server's loop."""

        async def there() -> T:
            return function(self.gateway)

        return asyncio.run_coroutine_threadsafe(there(), self._loop).result(10)

    def __enter__(self) -> LiveServer:
        self._thread.start()
        assert self._ready.wait(20), "the server did not start"
        return self

    def __exit__(self, *wrong: object) -> None:
        def stop(gateway: Any) -> None:
            self._server.should_exit = True
            for feed in list(gateway.feeds):
                feed.close()

        self.call(stop)
        self._thread.join(10)
        assert not self._thread.is_alive()


def robot_server(every: float = 0.1) -> LiveServer:
    """A server of the robot that is simulated; a minute has passed when it starts."""
    from serve_page_robot_kit import RobotGateway, references

    def make() -> RobotGateway:
        gateway = RobotGateway(references(pictures()))
        step = 200_000
        for number in range(300):
            gateway.robot.advance((number + 1) * step)
            gateway.ticks.append(gateway.robot.tick(gateway.budget, time.time() - (299 - number) * 0.2))
        return gateway

    async def run(gateway: RobotGateway) -> None:
        began, base = time.monotonic(), gateway.robot.now
        while True:
            await asyncio.sleep(every)
            gateway.robot.advance(base + int((time.monotonic() - began) * 1e6))
            gateway.push(gateway.robot.tick(gateway.budget, time.time()))

    return LiveServer(make, run)


if __name__ == "__main__":  # pictures of the robot: python tests/serve_page_kit.py FOLDER
    with robot_server() as live:
        print(*shoot(live.url, sys.argv[1]), sep="\n")
