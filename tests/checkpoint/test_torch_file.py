"""Files of torch.save are located tensor by tensor, without loading them."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from narrowboat.checkpoint import open_index, pack
from narrowboat.checkpoint import torch_file as torch_file_module
from narrowboat.errors import WeightsFormatError


def stored_bytes(path: Path, offset: int, count: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(count)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".anything"])
def test_entries_point_at_the_bytes(tmp_path: Path, suffix: str) -> None:
    tensors = {
        "z.weight": torch.randn(13, 7),
        "a.bias": torch.nn.Parameter(torch.randn(7).bfloat16()),
        "count": torch.tensor(3),
        "mask": torch.tensor([True, False]),
        "none": torch.empty(0, 3),
        "f8": torch.ones(5).to(torch.float8_e4m3fn),
    }
    path = tmp_path / f"model{suffix}"
    torch.save(tensors, path)
    index = open_index(path)
    assert list(index.entries) == list(tensors)
    assert not index.packed and index.aliases == {}
    index.require_streamable()
    for name, tensor in tensors.items():
        entry = index.entries[name]
        assert (entry.dtype, entry.shape, entry.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        assert stored_bytes(path, entry.offset, entry.nbytes) == tensor_bytes(tensor)


def test_shared_storages_are_tied_and_slices_are_not(tmp_path: Path) -> None:
    table, pool = torch.randn(8, 4), torch.arange(32.0)
    path = tmp_path / "model.pth"
    torch.save({"emb": table, "head": table, "low": pool[:8], "high": pool[8:24].view(4, 4), "flat": table[:2]}, path)
    index = open_index(path)
    assert index.aliases == {"head": "emb"}
    assert index.resolve("head") is index.entries["emb"]
    assert index.names() == ("emb", "low", "high", "flat", "head")
    index.require_streamable()
    high = index.entries["high"]
    assert stored_bytes(path, high.offset, high.nbytes) == tensor_bytes(pool[8:24])
    assert index.entries["flat"].offset == index.entries["emb"].offset


def test_tensors_without_elements_are_not_tied(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    empty = torch.empty(0, 2)
    torch.save({"a": empty, "b": empty, "c": torch.ones(1)}, path)
    assert open_index(path).aliases == {}


def test_strided_tensors_are_marked_and_packed_contiguous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    base = torch.randn(300, 40)
    tensors = {
        "t": base.t(),
        "column": base[:, 3],
        "window": base[5:200:2, 3:17],
        "expanded": torch.arange(5.0).view(5, 1).expand(5, 9),
        "one_row": torch.randn(40, 1, 50).transpose(0, 2),
        "plain": base,
    }
    path = tmp_path / "model.pth"
    torch.save(tensors, path)
    index = open_index(path)
    assert [name for name, entry in index.entries.items() if not entry.contiguous] == list(tensors)[:5]
    with pytest.raises(WeightsFormatError, match=r"'t' is not contiguous.*narrowboat pack"):
        index.require_streamable()
    # Small pieces, so that every branch of the blockwise copy is taken.
    monkeypatch.setattr("narrowboat.checkpoint.source.CHUNK", 256)
    pack(path, tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_nested_state_dict_is_unwrapped(tmp_path: Path, key: str) -> None:
    path = tmp_path / "run.ckpt"
    torch.save({"epoch": 3, key: {"w": torch.ones(2)}, "optimizer": {"state": {}}}, path)
    assert list(open_index(path).entries) == ["w"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"w": torch.ones(1), "epoch": 3}, r"also holds 'epoch' \(int\)"),
        ({}, "is empty"),
        ([torch.ones(1)], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
        ({"s": torch.ones(2, 2).to_sparse()}, "sparse or quantized"),
        ({"c": torch.ones(2, dtype=torch.complex128)}, "dtype torch.complex128"),
        ({"c": torch.ones(2, dtype=torch.complex64).conj()}, "lazy conjugate"),
        ({"m": torch.empty(2, device="meta")}, "no bytes in the file"),
        ({"f": Path("not/weights")}, "cannot be read as weights only"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, value: object, message: str) -> None:
    path = tmp_path / "model.pth"
    torch.save(value, path)
    with pytest.raises(WeightsFormatError, match=message) as caught:
        open_index(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, (f"open({str(tmp_path / 'boom')!r}, 'w')",))

    path = tmp_path / "model.pth"
    torch.save({"w": Bomb()}, path)
    with pytest.raises(WeightsFormatError):
        open_index(path)
    assert not (tmp_path / "boom").exists()


def test_legacy_format_says_how_to_convert(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsFormatError, match=r"weights_only=True.*narrowboat\.pack"):
        open_index(path)


def test_truncated_and_foreign_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"w": torch.ones(300)}, path)
    whole = path.read_bytes()
    for length in (0, 3, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsFormatError):
            open_index(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(WeightsFormatError):
        open_index(path)


def test_recompressed_archive_is_refused(tmp_path: Path) -> None:
    original, path = tmp_path / "model.pth", tmp_path / "zipped.pth"
    torch.save({"w": torch.ones(300)}, original)
    with zipfile.ZipFile(original) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    with pytest.raises(WeightsFormatError, match="compressed"):
        open_index(path)


def test_pickle_that_claims_more_than_its_record_is_refused(tmp_path: Path) -> None:
    original, path = tmp_path / "model.pth", tmp_path / "forged.pth"
    torch.save({"w": torch.ones(200)}, original)
    with zipfile.ZipFile(original) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith("data.pkl"):
                # 200 elements become 250, in the storage and in the shape (BININT1 opcodes).
                assert content.count(b"K\xc8") == 2
                content = content.replace(b"K\xc8", b"K\xfa")
            elif info.filename.endswith((".format_version", ".storage_alignment")):
                continue
            new.writestr(info.filename, content)
    with pytest.raises(WeightsFormatError, match=r"damaged|truncated|cannot be read"):
        open_index(path)


def test_tensors_saved_from_a_gpu_are_located_without_one(tmp_path: Path) -> None:
    original, path = tmp_path / "model.pth", tmp_path / "gpu.pth"
    torch.save({"w": torch.arange(4.0)}, original)
    with zipfile.ZipFile(original) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith("data.pkl"):
                here, gpu = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
                assert here in content
                content = content.replace(here, gpu)
            elif info.filename.endswith((".format_version", ".storage_alignment")):
                continue
            new.writestr(info.filename, content)
    entry = open_index(path).entries["w"]
    assert stored_bytes(path, entry.offset, entry.nbytes) == tensor_bytes(torch.arange(4.0))


def test_the_loader_is_always_weights_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    load = torch.load

    def spy(*args: object, **kwargs: object) -> object:
        seen.append(kwargs.get("weights_only"))
        return load(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch_file_module.torch, "load", spy)
    torch.save({"w": torch.ones(2)}, tmp_path / "model.pth")
    open_index(tmp_path / "model.pth")
    assert seen == [True]


def test_plain_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(pickle.dumps({"w": [1.0]}))
    with pytest.raises(WeightsFormatError, match="not a zip archive"):
        open_index(path)
