"""Images that are tried by hand: prepared as the networks expect, within limits, and answered in labels."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

from narrowboat.errors import BadRequestError, BeyondContractError, TooLargeError
from narrowboat.serve.errors_http import install
from narrowboat.serve.page import images
from narrowboat.serve.page.images import prepare
from narrowboat.serve.page.routes import router
from narrowboat.serve.page.trial import best, image_input, numbers, summary
from narrowboat.tasks.tensors import RawTensor, TensorSpec
from serve_kit import FACES, FakeGateway, raw, values

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (37, 23)) -> bytes:
    noise = np.random.default_rng(3).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, kind)
    return file.getvalue()


def one_colour(red: int, green: int, blue: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (red, green, blue)).save(file, "PNG")
    return file.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """A header that announces many pixels, and hardly any bytes of them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def post(path: str, gateway: FakeGateway | None = None, **asked: Any) -> Any:
    app = FastAPI()
    app.include_router(router(gateway or FakeGateway()))
    install(app)

    with TestClient(app) as client:
        return client.request("POST", path, **asked)


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "L"), ("JPEG", "RGB"), ("BMP", "RGB"), ("WEBP", "RGB")]
)
def test_an_image_is_prepared_as_the_zoo_prepares_it_bit_by_bit(tmp_path: Path, kind: str, mode: str) -> None:
    import torch

    from narrowboat.zoo.resolve import _load_image

    path = tmp_path / f"x.{kind.lower()}"
    path.write_bytes(picture(kind, mode))
    wanted = _load_image(path, (torch.zeros(1, 3, 16, 24),), MEAN, STD)
    ours = prepare(path.read_bytes(), (1, 3, 16, 24), MEAN, STD)
    assert torch.equal(torch.from_numpy(values(ours).copy()), wanted)


@pytest.mark.parametrize("data", [b"", b"GIF89a" + bytes(40), b"%!PS-Adobe EPSF", picture()[:90], picture()[:-200]])
def test_what_is_no_image_or_a_broken_one_is_refused(data: bytes) -> None:
    with pytest.raises(BadRequestError, match="no image that can be read"):
        prepare(data, (1, 3, 8, 8), MEAN, STD)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "ICO"])
def test_other_formats_are_never_opened(kind: str) -> None:
    with pytest.raises(BadRequestError, match="PNG, JPEG, BMP, WEBP"):
        prepare(picture(kind), (1, 3, 8, 8), MEAN, STD)


@pytest.mark.parametrize("size", [(6_000, 5_000), (60_000, 60_000)])
def test_a_decompression_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    with pytest.raises(TooLargeError):
        prepare(huge_png(*size), (1, 3, 8, 8), MEAN, STD)


def test_a_hand_tried_image_gets_its_label_and_what_became_of_its_deadline() -> None:
    answer = post("/v1/tasks/colours/try", content=one_colour(10, 250, 20), headers={"content-type": "image/png"})
    told = answer.json()
    assert answer.status_code == 200
    assert told["top"][0]["label"] == "green"
    assert sum(one["probability"] for one in told["top"]) == pytest.approx(1)
    assert (told["admitted"], told["bound_us"], told["deadline_us"], told["met"]) == (True, 8_000, 20_000, True)


def test_a_file_above_the_limit_is_refused_while_it_comes() -> None:
    def pieces() -> Any:
        for _ in range(images.MAX_BYTES // (1 << 20) + 2):
            yield bytes(1 << 20)

    answer = post("/v1/tasks/colours/try", content=pieces(), headers={"content-type": "image/png"})
    assert answer.status_code == 413
    assert answer.json()["type"] == "TooLargeError"


@pytest.mark.parametrize(
    ("name", "kind", "status"),
    [
        ("identity", "image/png", 400),
        ("colours", "text/html", 400),
        ("colours", "", 400),
        ("nobody", "image/png", 404),
    ],
)
def test_what_cannot_be_tried_is_told(name: str, kind: str, status: int) -> None:
    answer = post(f"/v1/tasks/{name}/try", content=one_colour(1, 2, 3), headers={"content-type": kind})
    assert answer.status_code == status


def test_the_gateways_refusal_is_the_answer() -> None:
    gateway = FakeGateway()
    gateway.fail("colours", BeyondContractError("too soon", retry_after=0.4))
    answer = post("/v1/tasks/colours/try", gateway, content=one_colour(1, 2, 3), headers={"content-type": "image/bmp"})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")


def test_outputs_that_are_no_scores_are_summarised() -> None:
    spec = TensorSpec("y", "FP32", (1, 2, 2))
    gateway = FakeGateway(
        [replace(FACES["colours"], outputs=(spec,))],
        {"colours": lambda _: [raw("FP32", [[[1.0, np.nan], [3.0, np.inf]]])]},
    )
    answer = post("/v1/tasks/colours/try", gateway, content=one_colour(1, 2, 3), headers={"content-type": "image/png"})
    (told,) = answer.json()["outputs"]
    assert told == {"name": "y", "datatype": "FP32", "shape": [1, 2, 2], "min": 1.0, "mean": 2.0, "max": 3.0}


def test_scores_become_probabilities_and_probabilities_stay() -> None:
    spec = TensorSpec("y", "FP32", (1, 3))
    softened = best((spec, raw("FP32", [[1.0, 3.0, 2.0]])), ["a", "b"])
    assert softened is not None
    assert [one["label"] for one in softened] == ["b", "class 2", "a"]
    assert softened[0]["probability"] == pytest.approx(0.665, abs=1e-3)
    kept = best((spec, raw("FP32", [[0.2, 0.7, 0.1]])), [])
    assert kept is not None and kept[0]["probability"] == pytest.approx(0.7)


@pytest.mark.parametrize("tensor", [raw("FP32", [[np.nan, 1]]), raw("INT32", [[1, 2]]), raw("FP32", [[1.0]])])
def test_what_is_no_scores_gets_no_labels(tensor: RawTensor) -> None:
    assert best((TensorSpec("y", tensor.datatype, tensor.shape), tensor), ["a", "b"]) is None


def test_a_tensor_of_bf16_is_read() -> None:
    tensor = RawTensor("BF16", (2,), (np.array([1.5, -2.0], "<f4").view("<u4") >> 16).astype("<u2").tobytes())
    assert numbers(tensor).tolist() == [1.5, -2.0]
    assert summary(TensorSpec("y", "BF16", (2,)), tensor)["max"] == 1.5


@pytest.mark.parametrize(
    "change", [{"facts": {}}, {"inputs": (TensorSpec("x", "FP16", (1, 3, 8, 8)),)}, {"inputs": ()}]
)
def test_only_a_task_with_one_image_input_takes_images(change: dict[str, Any]) -> None:
    face = replace(FACES["colours"], **change)
    with pytest.raises(BadRequestError, match="takes no image"):
        image_input(face)
