"""Requests ready to be written to a socket, each with the answer that it has to get."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

_HOST = "127.0.0.1:PORT"


def at(request: bytes, port: int) -> bytes:
    """The request for a server at a port of loopback."""
    return request.replace(b"127.0.0.1:PORT", b"127.0.0.1:%d" % port, 1)


def http(path: str, body: bytes, headers: Iterable[str] = ()) -> bytes:
    """A request of HTTP/1.1; whoever sends it puts the port in (``at``)."""
    lines = [f"POST {path} HTTP/1.1", f"Host: {_HOST}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def binary(task: str, name: str, row: np.ndarray) -> bytes:
    """By the Open Inference Protocol, bytes in and out."""
    tensor = {"name": name, "datatype": "FP32", "shape": list(row.shape)}
    told = {
        "inputs": [{**tensor, "parameters": {"binary_data_size": row.nbytes}}],
        "parameters": {"binary_data_output": True},
    }
    head = json.dumps(told).encode()
    headers = ("Content-Type: application/octet-stream", f"Inference-Header-Content-Length: {len(head)}")
    return http(f"/v2/models/{task}/infer", head + row.tobytes(), headers)


def text(task: str, name: str, row: np.ndarray) -> bytes:
    """By the Open Inference Protocol, numbers in and out."""
    tensor = {"name": name, "datatype": "FP32", "shape": list(row.shape), "data": row.ravel().tolist()}
    body = json.dumps({"inputs": [tensor]}).encode()
    return http(f"/v2/models/{task}/infer", body, ("Content-Type: application/json",))


def litserve(row: np.ndarray) -> bytes:
    """As LitServe is asked: JSON both ways."""
    body = json.dumps({"x": row.ravel().tolist()}).encode()
    return http("/predict", body, ("Content-Type: application/json",))


def stream(
    name: str, requests: Iterable[bytes], answers: Iterable[bytes], check: str, rate: float | None = None
) -> dict[str, Any]:
    """Requests in turn, as ``load_client`` takes them.

    Args:
        name: for its figures.
        requests: as they are written.
        answers: the bytes that each has to get.
        check: "bytes": after the JSON; "oip": numbers in ``outputs[0].data``; "litserve": numbers in ``y``.
        rate: per second; None: one after another on every connection.
    """
    pairs = [[_text(request), _text(answer)] for request, answer in zip(requests, answers, strict=True)]
    return {"name": name, "pairs": pairs, "check": check, "rate": rate}


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
