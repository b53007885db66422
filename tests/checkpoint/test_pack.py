"""pack: page-aligned, in order, ties once, and still a file that every other reader opens."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from narrowboat.checkpoint import PAGE, open_index, pack, verify
from narrowboat.errors import UsageError, WeightsChangedError, WeightsFormatError, WeightsMismatchError

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64,
    torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    usable = text.filter(lambda name: not name.startswith(("__metadata__", "__narrowboat")))  # reserved
    names = draw(st.lists(usable, unique=True, max_size=8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    tensors = {}
    for name in names:
        shape = draw(st.lists(st.integers(0, 40), max_size=3))
        dtype = draw(st.sampled_from(DTYPES))
        count = torch.Size(shape).numel() * dtype.itemsize
        # Random bits, NaNs among them; booleans have only two.
        bits = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8, generator=generator)
        tensors[name] = bits.view(dtype).reshape(shape)
    return tensors


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=state_dicts(), data=st.data())
def test_any_weights_come_back_aligned_and_bit_for_bit(
    tmp_path: Path, tensors: dict[str, torch.Tensor], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(list(tensors)))[: data.draw(st.integers(0, len(tensors)))]
    path = tmp_path / "packed.safetensors"
    report = pack(tensors, path, order=order, overwrite=True)
    index = open_index(path)
    content = path.read_bytes()

    assert index.packed and index.digest == report.digest
    assert list(index.entries) == order + [name for name in tensors if name not in order]
    assert len(content) % PAGE == 0 and len(content) == report.file_bytes
    assert report.total_bytes == index.total_bytes == sum(t.nbytes for t in tensors.values())
    for name, tensor in tensors.items():
        entry = index.entries[name]
        assert entry.offset % PAGE == 0 and entry.contiguous
        assert (entry.dtype, entry.shape) == (tensor.dtype, tuple(tensor.shape))
        assert content[entry.offset : entry.end] == raw(tensor)
        assert not any(content[entry.end : -(-entry.end // PAGE) * PAGE])
    pages = [(e.offset, -(-e.end // PAGE) * PAGE) for e in index.entries.values()]
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(pages))

    loaded = {k: v for k, v in load_file(path).items() if not k.startswith("__narrowboat_pad__.")}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert raw(loaded[name]) == raw(tensor)
    verify(path)


def test_metadata_says_format_and_one_narrowboat_key(tmp_path: Path) -> None:
    tied = torch.ones(3)
    path = tmp_path / "m.safetensors"
    pack({"a": torch.ones(PAGE), "b": tied, "c": tied}, path, order=["b"])
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        # `a` ends on a page by itself (4 pages of float32): padding only where needed.
        assert sorted(file.keys()) == ["__narrowboat_pad__.0000", "a", "b"]
    assert metadata.keys() == {"format", "narrowboat"} and metadata["format"] == "pt"
    record = json.loads(metadata["narrowboat"])
    assert record["order"] == ["b", "a"] and record["aliases"] == {"c": "b"}
    assert record["digests"].keys() == {"a", "b"}


def test_module_with_tied_weights_is_stored_once(tmp_path: Path) -> None:
    model = torch.nn.Module()
    model.embed = torch.nn.Embedding(50, 16)
    model.head = torch.nn.Linear(16, 50, bias=False)
    model.head.weight = model.embed.weight
    report = pack(model.state_dict(), tmp_path / "m.safetensors")
    index = open_index(tmp_path / "m.safetensors")
    assert report.tensors == 1 and report.aliases == 1
    assert index.aliases == {"head.weight": "embed.weight"}
    assert index.resolve("head.weight") is index.entries["embed.weight"]
    assert index.total_bytes == 50 * 16 * 4


def test_ties_of_a_torch_file_survive_packing_and_repacking(tmp_path: Path) -> None:
    table = torch.randn(5, 6)
    torch.save({"head": table, "x": torch.ones(2), "emb": table, "t": table.t()}, tmp_path / "m.pth")
    pack(tmp_path / "m.pth", tmp_path / "m.safetensors", order=["x", "emb"])
    index = open_index(tmp_path / "m.safetensors")
    assert list(index.entries) == ["x", "head", "t"] and index.aliases == {"emb": "head"}
    again = pack(tmp_path / "m.safetensors", tmp_path / "n.safetensors", order=["t"])
    assert open_index(tmp_path / "n.safetensors").aliases == {"emb": "head"}
    assert again.digest == index.digest  # identity does not depend on the order
    assert torch.equal(load_file(tmp_path / "n.safetensors")["t"], table.t())


def test_views_of_one_tensor_are_not_ties(tmp_path: Path) -> None:
    base = torch.arange(16.0).view(4, 4)
    tensors = {"base": base, "t": base.t(), "row": base[0], "flat": base.view(16), "half": base[:2]}
    pack(tensors, tmp_path / "m.safetensors")
    assert open_index(tmp_path / "m.safetensors").aliases == {}
    loaded = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_lazy_conjugates_in_memory_are_resolved(tmp_path: Path) -> None:
    z = torch.randn(4, dtype=torch.complex64)
    tensors = {"z": z, "conj": z.conj(), "neg": z.conj().imag}
    pack(tensors, tmp_path / "m.safetensors")
    loaded = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_order_may_be_a_subset_with_repetitions_but_not_unknown(tmp_path: Path) -> None:
    tensors = {name: torch.ones(2) for name in "abcd"}
    pack(tensors, tmp_path / "m.safetensors", order=["c", "a", "c"])
    assert list(open_index(tmp_path / "m.safetensors").entries) == ["c", "a", "b", "d"]
    with pytest.raises(WeightsMismatchError, match="'nope'"):
        pack(tensors, tmp_path / "n.safetensors", order=["a", "nope"])
    with pytest.raises(UsageError, match="list of tensor names"):
        pack(tensors, tmp_path / "n.safetensors", order="abc")
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_destination_is_never_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_text("precious")
    with pytest.raises(UsageError, match="exists already"):
        pack({"w": torch.ones(1)}, path)
    assert path.read_text() == "precious"
    pack({"w": torch.ones(1)}, path, overwrite=True)
    assert open_index(path).packed
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_source_may_be_its_own_destination(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tensors = {"a": torch.randn(100), "b": torch.randn(3, 3)}
    save_file(tensors, path)
    pack(path, path, order=["b"], overwrite=True)
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_tensors_mapped_from_the_destination_survive_its_replacement(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.arange(5000.0)}, path)
    pack(load_file(path), path, overwrite=True)
    pack(load_file(path), path, overwrite=True)  # the padding entry that load_file returns is not packed again
    assert list(open_index(path).entries) == ["a"]
    assert torch.equal(load_file(path)["a"], torch.arange(5000.0))


@pytest.mark.parametrize("name", ["folder", "missing/m.safetensors", "m.pth", "m.bin"])
def test_unusable_destinations_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError):
        pack({"w": torch.ones(1)}, tmp_path / name, overwrite=True)
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        ({"w": 3}, UsageError),
        ({3: torch.ones(1)}, UsageError),
        ({"__metadata__": torch.ones(1)}, UsageError),
        ({"w": torch.ones(1, device="meta")}, UsageError),
        ({"w": torch.ones(1, dtype=torch.complex128)}, WeightsFormatError),
        ({"w": torch.ones(2, 2).to_sparse()}, WeightsFormatError),
        ({"\ud800": torch.ones(1)}, WeightsFormatError),
    ],
)
def test_what_safetensors_cannot_hold_is_refused(tmp_path: Path, tensors: dict, error: type[Exception]) -> None:
    with pytest.raises(error):
        pack(tensors, tmp_path / "m.safetensors")
    assert os.listdir(tmp_path) == []


def test_large_tensors_pass_in_pieces_and_progress_is_told(tmp_path: Path) -> None:
    big = torch.randint(0, 255, (20 * 2**20 + 5,), dtype=torch.uint8)
    torch.save({"big": big, "t": torch.randn(1500, 1600).t()}, tmp_path / "m.pth")
    calls: list[tuple[int, int]] = []
    pack(tmp_path / "m.pth", tmp_path / "m.safetensors", progress=lambda done, total: calls.append((done, total)))
    total = big.nbytes + 1500 * 1600 * 4
    assert calls[-1] == (total, total) and len(calls) >= 5
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert torch.equal(load_file(tmp_path / "m.safetensors")["big"], big)


def test_source_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "m.pth"
    torch.save({"a": torch.ones(10), "b": torch.ones(10)}, source)
    with pytest.raises(WeightsChangedError):
        pack(source, tmp_path / "m.safetensors", progress=lambda *_: os.utime(source, ns=(1, 1)))
    with pytest.raises(WeightsChangedError):
        pack(source, tmp_path / "m.safetensors", progress=lambda *_: os.truncate(source, 100))
    assert os.listdir(tmp_path) == ["m.pth"]


def test_rewritten_file_that_kept_the_metadata_is_plain_but_keeps_its_ties(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tied = torch.ones(4)
    pack({"a": tied, "b": tied, "c": torch.ones(5)}, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    halves = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in load_file(path).items()
    }
    save_file(halves, path, metadata=metadata)
    index = open_index(path)
    assert not index.packed and index.digests == {} and index.aliases == {"b": "a"}
    assert set(index.entries) == {"a", "c"}


def test_altered_header_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    pack({"a": torch.ones(4, dtype=torch.float16), "b": torch.ones(4)}, path)
    content = path.read_bytes()
    for old, new in ((b'"F16"', b'"I16"'), (b'"a":{', b'"z":{')):
        assert old in content
        path.write_bytes(content.replace(old, new, 1))
        with pytest.raises(WeightsFormatError, match="altered after it was packed"):
            open_index(path)


def test_transformers_loads_a_packed_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = transformers.BertModel(config).eval()
    model.save_pretrained(tmp_path / "plain")
    (tmp_path / "packed").mkdir()
    config.save_pretrained(tmp_path / "packed")
    pack(tmp_path / "plain", tmp_path / "packed" / "model.safetensors")
    loaded, info = transformers.BertModel.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).last_hidden_state, model(tokens).last_hidden_state)


PACK_IN_CHILD = """
import sys
from narrowboat.checkpoint import pack
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:")) // 1024
import torch
torch.save({"w": torch.ones(3)}, sys.argv[1] + ".warm.pth")
pack(sys.argv[1] + ".warm.pth", sys.argv[2] + ".warm.safetensors")
before = peak()
pack(sys.argv[1], sys.argv[2])
print(peak() - before)
"""


def test_packing_200_mb_stays_below_64_mb_of_memory(tmp_path: Path) -> None:
    source = tmp_path / "m.pth"
    big = torch.empty(22, 2**20)
    torch.save({"a": big, "t": torch.empty(1024, 2048).t(), "b": big.clone(), "n": torch.empty(3)}, source)
    assert source.stat().st_size > 190e6
    command = [sys.executable, "-c", PACK_IN_CHILD, str(source), str(tmp_path / "m.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64
