"""The page as one document: its parts, each a small file, put together when the gateway starts.

Nothing is fetched from elsewhere, and nothing runs but this one script and this one style sheet: the policy that goes
with the document names both by their digests.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PARTS = Path(__file__).parent / "static"
# In the order in which they use each other; they share one scope, so a name that is given twice is a syntax error.
SCRIPTS = (
    "quantities.js",
    "dom.js",
    "theme.js",
    "api.js",
    "stream.js",
    "rings.js",
    "state.js",
    "canvas.js",
    "memory_chart.js",
    "gantt.js",
    "responses.js",
    "plan_view.js",
    "header.js",
    "verdict.js",
    "budget.js",
    "what_if.js",
    "tasks.js",
    "trial_results.js",
    "trial.js",
    "main.js",
)
STYLES = ("page.css", "panels.css")


@dataclass(frozen=True)
class Document:
    """What is answered to ``GET /``.

    Attributes:
        body: of the document, UTF-8.
        packed: the same, compressed by gzip.
        etag: of its content.
        policy: for ``Content-Security-Policy``.
    """

    body: bytes
    packed: bytes
    etag: str
    policy: str

    def headers(self) -> dict[str, str]:
        """That go with it: nobody may frame it, sniff its type, or add to what it loads."""
        return {
            "Content-Security-Policy": self.policy,
            "ETag": self.etag,
            "Cache-Control": "no-cache",
            "Vary": "Accept-Encoding",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
        }


@cache
def document() -> Document:
    """The page of one machine; its files are read once."""
    return compose(PARTS / "index.html", [PARTS / name for name in SCRIPTS], [PARTS / name for name in STYLES])


def compose(page: Path, scripts: Sequence[Path], styles: Sequence[Path]) -> Document:
    """A document of parts.

    Args:
        page: HTML, with the marks ``/* style */`` and ``/* script */``.
        scripts: in the order in which they use each other.
        styles: likewise.
    """
    style = "\n" + "\n".join(_read(path) for path in styles)
    parts = "\n".join(f"// {path.name}\n{_read(path)}" for path in scripts)
    script = f'\n(() => {{\n"use strict";\n{parts}\n}})();\n'
    shell = _read(page)
    for mark, inlined in (("/* style */", style), ("/* script */", script)):
        if shell.count(mark) != 1 or "</s" in inlined:
            raise AssertionError(f"{page.name} has to have {mark!r} once, and no part may end its element")
        shell = shell.replace(mark, inlined)
    body = shell.encode()
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src '{_digest(script)}'",
            f"style-src '{_digest(style)}'",
            "connect-src 'self'",
            "img-src data: blob:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
    etag = f'"{hashlib.sha256(body + policy.encode()).hexdigest()[:24]}"'
    return Document(body, gzip.compress(body, 9, mtime=0), etag, policy)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
