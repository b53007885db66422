"""verify reads every byte and names the tensor and the file that are not what was packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from narrowboat.checkpoint import open_index, pack, verify
from narrowboat.errors import DigestError, WeightsFormatError


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    path = tmp_path / "m.safetensors"
    pack({"first": torch.randn(3000), "second": torch.randn(7, 3), "none": torch.empty(0)}, path)
    return path


def test_intact_file_is_reported_with_its_digest(packed: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = verify(packed, progress=lambda done, total: calls.append((done, total)))
    assert (report.tensors, report.total_bytes) == (3, 12000 + 84)
    assert report.digest == open_index(packed).digest and report.files == (packed,)
    assert calls[-1] == (12084, 12084)


@pytest.mark.parametrize(("name", "where"), [("first", 0), ("first", 11999), ("second", 40), ("second", 84)])
def test_flipped_bit_is_found_and_named(packed: Path, name: str, where: int) -> None:
    flip(packed, open_index(packed).entries[name].offset + where)
    with pytest.raises(DigestError, match=name) as caught:
        verify(packed)
    assert str(packed) in str(caught.value)
    assert ("second" if name == "first" else "first") not in str(caught.value)


def test_packing_again_does_not_bless_damage(packed: Path, tmp_path: Path) -> None:
    flip(packed, open_index(packed).entries["second"].offset)
    with pytest.raises(DigestError, match="second"):
        pack(packed, tmp_path / "n.safetensors")
    assert not (tmp_path / "n.safetensors").exists()


def test_flipped_bits_in_the_header_never_pass(packed: Path) -> None:
    content, entries = packed.read_bytes(), open_index(packed).entries
    length = len(content[8 : open_index(packed).entries["first"].offset].rstrip())
    for offset in range(0, 8 + length, 7):
        packed.write_bytes(content)
        flip(packed, offset)
        try:
            verify(packed)
        except (WeightsFormatError, DigestError):
            continue
        # What may pass is a flip that leaves every name, type, shape and place as it was.
        assert open_index(packed).entries == entries


def test_file_without_digests_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors")
    with pytest.raises(WeightsFormatError, match="no digests"):
        verify(tmp_path / "m.safetensors")
