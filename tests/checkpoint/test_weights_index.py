"""open_index: which files make up the weights, and whether they are still what was opened."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from narrowboat.checkpoint import open_index, pack
from narrowboat.errors import StorageError, WeightsChangedError, WeightsFormatError, WeightsNotFoundError


def sharded(folder: Path, kind: str = "safetensors") -> Path:
    shards = {f"part-1.{kind}": {"a": torch.ones(2), "b": torch.ones(3)}, f"part-2.{kind}": {"c": torch.ones(4)}}
    weight_map = {}
    for shard, tensors in shards.items():
        (save_file if kind == "safetensors" else torch.save)(tensors, folder / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    stem = "model" if kind == "safetensors" else "pytorch_model"
    path = folder / f"{stem}.{kind}.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 36}, "weight_map": weight_map}))
    return path


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_sharded_weights_by_index_and_by_folder(tmp_path: Path, kind: str) -> None:
    path = sharded(tmp_path, kind)
    for source in (path, tmp_path, str(tmp_path)):
        index = open_index(source)
        assert set(index.names()) == {"a", "b", "c"}
        assert index.total_bytes == 36
        assert [file.name for file in index.files] == [f"part-1.{kind}", f"part-2.{kind}"]
        assert index.entries["c"].file == tmp_path / f"part-2.{kind}"


def test_sharded_weights_pack_into_one_file_and_packed_shards_stay_packed(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    one = pack(path, tmp_path / "one.safetensors")
    for shard in ("part-1.safetensors", "part-2.safetensors"):
        pack(tmp_path / shard, tmp_path / shard, overwrite=True)
    index = open_index(path)
    assert index.packed and index.digests.keys() == {"a", "b", "c"}
    assert index.digest == one.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": "part-2.safetensors"}, "'a' is in part-2.safetensors, but it is in part-1.safetensors"),
        ({"d": "part-1.safetensors"}, "'d' is in part-1.safetensors, but no shard holds it"),
        ({"b": None}, "does not list tensor 'b', which part-1.safetensors holds"),
        ({"a": "../part-1.safetensors"}, "not a file name"),
        ({"a": 3}, "not a file name"),
        ({"a": ""}, "not a file name"),
    ],
)
def test_shards_that_disagree_with_their_index_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    path = sharded(tmp_path)
    index = json.loads(path.read_text())
    index["weight_map"] = {k: v for k, v in (index["weight_map"] | change).items() if v is not None}
    path.write_text(json.dumps(index))
    with pytest.raises(WeightsFormatError, match=message):
        open_index(path)


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    save_file({"c": torch.ones(4), "a": torch.ones(2)}, tmp_path / "part-2.safetensors")
    with pytest.raises(WeightsFormatError, match=r"both part-1.safetensors and part-2.safetensors hold tensor 'a'"):
        open_index(path)


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"weight_map": {}}', '{"weight_map": []}', "\ufeff"])
def test_what_is_no_index_of_shards_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(WeightsFormatError):
        open_index(path)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    (tmp_path / "part-2.safetensors").unlink()
    with pytest.raises(WeightsNotFoundError, match=r"part-2\.safetensors"):
        open_index(path)


def test_folder_prefers_what_from_pretrained_prefers(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    assert open_index(tmp_path).files == (tmp_path / "pytorch_model.bin",)
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    assert open_index(tmp_path).files == (tmp_path / "model.safetensors",)


def test_folder_with_a_single_unusual_file(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "adapter.safetensors")
    assert open_index(tmp_path).files == (tmp_path / "adapter.safetensors",)
    save_file({"w": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsNotFoundError, match="2 safetensors files"):
        open_index(tmp_path)


def test_link_into_a_cache_of_blobs_is_followed(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "0f3a")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../0f3a")
    assert open_index(tmp_path / "snapshot").names() == ("w",)
    assert open_index(tmp_path / "0f3a").names() == ("w",)


def test_paths_without_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling.safetensors").symlink_to("nowhere")
    for path in (
        "empty",
        "missing.safetensors",
        "missing.pth",
        "dangling.safetensors",
        "no/such/folder.pth",
        "x" * 300,
    ):
        with pytest.raises(WeightsNotFoundError, match=path[:20]):
            open_index(tmp_path / path)
    with pytest.raises(WeightsNotFoundError):
        open_index("nul\0byte")


def test_pipes_and_other_formats_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(WeightsFormatError, match="not a regular file"):
        open_index(tmp_path / "pipe.safetensors")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(WeightsFormatError, match="neither a safetensors file nor"):
        open_index(tmp_path / "model.gguf")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(1)}, path)
    path.chmod(0)
    with pytest.raises(WeightsNotFoundError, match="permission"):
        open_index(path)


@pytest.mark.parametrize(("number", "expected"), [(13, WeightsNotFoundError), (5, StorageError)])
def test_system_errors_become_named_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[Exception]
) -> None:
    def fail(*args: object, **kwargs: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(expected, match=r"model\.safetensors"):
        open_index(tmp_path / "model.safetensors")


def test_changes_after_opening_are_noticed(tmp_path: Path) -> None:
    path, copy = tmp_path / "model.safetensors", tmp_path / "copy.safetensors"
    save_file({"w": torch.ones(4)}, path)
    save_file({"w": torch.zeros(4)}, copy)
    index = open_index(path)
    index.check_unchanged()
    os.utime(path, ns=(1, 1))
    with pytest.raises(WeightsChangedError, match="altered"):
        index.check_unchanged()
    index = open_index(path)
    os.replace(copy, path)
    with pytest.raises(WeightsChangedError, match="replaced"):
        index.check_unchanged()
    index = open_index(path)
    os.truncate(path, 20)
    with pytest.raises(WeightsChangedError, match="altered"):
        index.check_unchanged()
    path.unlink()
    with pytest.raises(WeightsChangedError, match="cannot be found"):
        index.check_unchanged()


def test_digest_of_unpacked_weights_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(4)}, path)
    first = open_index(path).digest
    assert open_index(path).digest == first
    os.utime(path, ns=(1, 1))
    assert open_index(path).digest != first


def test_opening_reads_the_header_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(2**20)}, path)
    read = 0
    pread = os.pread

    def counted(descriptor: int, count: int, offset: int) -> bytes:
        nonlocal read
        read += count
        return pread(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", counted)
    assert open_index(path).resolve("w") is not None
    assert open_index(path).resolve("nothing") is None
    assert 0 < read < 4096
