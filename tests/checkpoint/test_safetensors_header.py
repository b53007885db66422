"""A safetensors header is believed only where it is consistent with itself and with the file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from narrowboat.checkpoint import open_index
from narrowboat.errors import WeightsFormatError

F32_2X2 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def write(path: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_entries_point_at_the_bytes_of_every_dtype(tmp_path: Path) -> None:
    dtypes = [
        torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64,
        torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
        torch.float8_e4m3fn, torch.float8_e5m2,
    ]  # fmt: skip
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(3.5), "none": torch.empty(0, 4)}
    path = tmp_path / "all.safetensors"
    save_file(tensors, path)
    index = open_index(path)
    raw = path.read_bytes()
    assert index.entries.keys() == tensors.keys()
    assert not index.packed and index.digests == {} and index.aliases == {}
    assert [e.offset for e in index.entries.values()] == sorted(e.offset for e in index.entries.values())
    for name, tensor in tensors.items():
        entry = index.entries[name]
        assert (entry.dtype, entry.shape, entry.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        assert raw[entry.offset : entry.end] == bytes(tensor.reshape(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"w": {**F32_2X2, "dtype": "F99"}}, 16, "tensor 'w' has the unknown dtype 'F99'"),
        ({"w": {**F32_2X2, "dtype": 7}}, 16, "unknown dtype 7"),
        ({"w": {**F32_2X2, "dtype": ["F32"]}}, 16, "unknown dtype"),
        ({"w": {**F32_2X2, "shape": [2, 3]}}, 16, "takes 24 bytes, its data_offsets give 16"),
        ({"w": {**F32_2X2, "shape": [-2, -2]}}, 16, "sizes must be whole numbers"),
        ({"w": {**F32_2X2, "shape": [2.0, 2]}}, 16, "sizes must be whole numbers"),
        ({"w": {**F32_2X2, "shape": [True, 4]}}, 16, "sizes must be whole numbers"),
        ({"w": {**F32_2X2, "shape": [float("nan"), 2]}}, 16, "sizes must be whole numbers"),
        ({"w": {**F32_2X2, "shape": [2**64, 2]}}, 16, "sizes must be whole numbers"),
        ({"w": {**F32_2X2, "shape": 4}}, 16, "sizes must be whole numbers"),
        ({"w": {**F32_2X2, "data_offsets": [0]}}, 16, "must be two whole numbers"),
        ({"w": {**F32_2X2, "data_offsets": [-16, 0]}}, 16, "must be two whole numbers"),
        ({"w": {**F32_2X2, "data_offsets": [0, float("inf")]}}, 16, "must be two whole numbers"),
        ({"w": {**F32_2X2, "data_offsets": [16, 0]}}, 16, "data_offsets give -16"),
        ({"w": {"dtype": "F32", "shape": [4]}}, 16, "lacks dtype, shape or data_offsets"),
        ({"w": [1, 2]}, 16, "lacks dtype, shape or data_offsets"),
        ({"w": F32_2X2}, 15, "is truncated: tensor 'w' ends at byte"),
        ({"w": F32_2X2}, 17, "1 bytes after the last tensor belong to none"),
        ({"w": {**F32_2X2, "data_offsets": [8, 24]}}, 24, "tensor 'w' at byte [0-9]+ leaves a hole"),
        ({"a": F32_2X2, "b": {**F32_2X2, "data_offsets": [8, 24]}}, 24, "tensor 'b' at byte [0-9]+ overlaps"),
        ({"\ud800": F32_2X2}, 16, "not valid text"),
        ({"__metadata__": {"step": 3}, "w": F32_2X2}, 16, "__metadata__ in its header must map text to text"),
        ({"__metadata__": {"narrowboat": "{"}, "w": F32_2X2}, 16, "narrowboat metadata is not valid JSON"),
        ({"__metadata__": {"narrowboat": "{}"}, "w": F32_2X2}, 16, "has no version"),
        ({"__metadata__": {"narrowboat": '{"version":1}'}, "w": F32_2X2}, 16, "metadata is malformed"),
        ({"__metadata__": {"narrowboat": '{"version":99}'}, "w": F32_2X2}, 16, "upgrade narrowboat"),
        (b'{"w":1,"w":2}', 0, "names 'w' twice"),
        (b'{"w":', 0, "not valid JSON"),
        (b'{"w":"\xff"}', 0, "not valid JSON"),
        (b'{"w":' + b"[" * 200_000, 0, "not valid JSON"),
        (b'{"w":' + b"9" * 9_000 + b"}", 0, "not valid JSON"),
        (b"[]", 0, "does not start with"),
        (b"", 0, "does not start with"),
    ],
)  # fmt: skip
def test_malformed_header_is_refused_with_one_line(tmp_path: Path, header: object, data: int, message: str) -> None:
    path = write(tmp_path / "bad.safetensors", header, bytes(data))
    with pytest.raises(WeightsFormatError, match=message) as caught:
        open_index(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes hold no header"),
        (b"1234567", "7 bytes hold no header"),
        ((100_000_001).to_bytes(8, "little") + b"{}", "ask for a header of 100000001 bytes"),
        (b"\xff" * 64, "ask for a header"),
        ((500).to_bytes(8, "little") + b"{}", "truncated: its header takes 500 bytes, the file has 10"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsFormatError, match=re.escape(message)):
        open_index(path)


def test_truncation_anywhere_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "whole.safetensors"
    save_file({"a": torch.ones(3, 5), "b": torch.ones(7)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsFormatError):
            open_index(path)
