"""The body of a request, within a limit, whatever it claims and however well it was compressed."""

from __future__ import annotations

import asyncio
import zlib

from starlette.requests import Request

from narrowboat.errors import BadRequestError, TooLargeError

# What follows "wbits" of zlib: 31 reads gzip, 15 zlib, which is what HTTP calls deflate.
_WINDOWS = {"gzip": 31, "x-gzip": 31, "deflate": 15}


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, decompressed.

    Args:
        request: whose.
        limit: bytes, before and after decompression.

    Raises:
        TooLargeError: more than that.
        BadRequestError: compressed in a way that is not known, or broken.
    """
    chunks, size = [], 0
    async for chunk in request.stream():
        if chunk:
            size += len(chunk)
            if size > limit:
                raise TooLargeError(f"the body is larger than {limit} bytes", details={"limit": limit})
            chunks.append(chunk)
    body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in _WINDOWS:
        raise BadRequestError(f"Content-Encoding {encoding[:40]!r} is not supported; gzip and deflate are")
    # In a thread: others' requests go on meanwhile.
    return await asyncio.to_thread(_inflate, body, _WINDOWS[encoding], limit)


def _inflate(body: bytes, window: int, limit: int) -> bytes:
    machine = zlib.decompressobj(window)
    try:
        found = machine.decompress(body, limit + 1)
    except zlib.error as wrong:
        raise BadRequestError(f"the body is not compressed as it says: {wrong}") from None
    if len(found) > limit:
        raise TooLargeError(f"the body is larger than {limit} bytes once decompressed", details={"limit": limit})
    if not machine.eof:
        raise BadRequestError("the compressed body ends too soon")
    if machine.unused_data:
        raise BadRequestError("something follows the compressed body")
    return found
