"""What stands behind the door of a cluster: the protocols of one machine, and a page about the nodes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from fastapi import FastAPI

from narrowboat import __version__
from narrowboat.serve.errors_http import install
from narrowboat.serve.interface import Gateway
from narrowboat.serve.page.document import PARTS, Document, compose
from narrowboat.serve.schema import publish
from narrowboat.serve.settings import ServeSettings

_HERE = Path(__file__).parent / "page"
_SHARED = ("quantities.js", "dom.js", "theme.js", "api.js")


@cache
def cluster_page() -> Document:
    """The page; its files are read once."""
    scripts = [*(PARTS / name for name in _SHARED), _HERE / "cluster.js"]
    return compose(_HERE / "index.html", scripts, [PARTS / "page.css", PARTS / "panels.css", _HERE / "cluster.css"])


def make_cluster_rooms(gateway: Gateway, settings: ServeSettings) -> FastAPI:
    """All routes, with errors in their one form, and nothing that guards them."""
    from narrowboat.serve.admin.routes import router as admin
    from narrowboat.serve.oip.routes import router as oip
    from narrowboat.serve.openai.routes import router as openai
    from narrowboat.serve.page.routes import router as page
    from narrowboat.serve.watch.routes import router as watch

    rooms = FastAPI(
        title="narrowboat cluster",
        version=__version__,
        description="PyTorch tasks with deadlines on the nodes of a cluster, each within its own byte budget.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    rooms.include_router(oip(gateway, max_bytes=settings.limits.body_bytes))
    rooms.include_router(page(gateway, cluster_page()))
    for router in (openai, watch, admin):
        rooms.include_router(router(gateway))
    install(rooms)
    publish(rooms)
    return rooms
