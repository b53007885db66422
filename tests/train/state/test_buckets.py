"""Records on storage in two generations: what is there is that of the last commit."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowboat.errors import SpillError, TrainingError, UsageError
from narrowboat.machine.pagecache import cached_bytes
from narrowboat.train.state.buckets import BucketFile
from narrowboat.train.state.layout import record_bytes
from narrowboat.train.state.storage_file import StorageFile

SIZES = {"a": 8192, "b": 4096, "c": 40_000}


def content(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((30, 10), value), "step": torch.tensor(value), "none": torch.empty(0, 3)}


def value_of(file: BucketFile, record: str) -> float | None:
    if record not in file:
        return None
    loaded = file.read(record)
    try:
        w = loaded.tensors["w"]
        assert torch.equal(w, torch.full((30, 10), w[0, 0].item()))
        assert loaded.tensors["none"].shape == (0, 3)
        assert loaded.tensors["step"].item() == w[0, 0].item()
        return w[0, 0].item()
    finally:
        file.release(loaded)


@contextmanager
def opened(folder: Path, **options: object) -> Iterator[BucketFile]:
    file = BucketFile(folder, "test", SIZES, **options)  # type: ignore[arg-type]
    try:
        yield file
    finally:
        file.close()


def test_what_is_written_is_read_before_and_after_its_commit(tmp_path: Path) -> None:
    with opened(tmp_path) as file:
        file.write("a", content(1))
        assert value_of(file, "a") == 1
        file.commit(1, {"note": "x"})
        assert (value_of(file, "a"), file.step, file.extra) == (1, 1, {"note": "x"})
    with opened(tmp_path, resume=True) as file:
        assert (value_of(file, "a"), value_of(file, "b"), file.step, file.extra) == (1, None, 1, {"note": "x"})


def test_without_a_commit_the_former_generation_counts(tmp_path: Path) -> None:
    with opened(tmp_path) as file:
        file.write("a", content(1))
        file.commit(1)
        file.write("a", content(2))
        file.write("a", content(3))
        file.write("b", content(3))
    with opened(tmp_path, resume=True) as file:
        assert (value_of(file, "a"), value_of(file, "b"), file.step) == (1, None, 1)
        file.write("a", content(4))
        file.discard()
        assert value_of(file, "a") == 1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("write"), st.sampled_from("abc"), st.integers(1, 5)),
            st.tuples(st.sampled_from(["commit", "discard", "reopen", "prefetch"]), st.just("a"), st.just(0)),
        ),
        max_size=25,
    )
)
def test_it_is_a_dictionary_with_commits(actions: list[tuple[str, str, int]]) -> None:
    """Against a model; contents of three sizes, the largest beyond what was reserved for most records."""
    committed: dict[str, int] = {}
    pending: dict[str, int] = {}
    step = 0
    with tempfile.TemporaryDirectory() as folder:
        file = BucketFile(folder, "test", SIZES, resume=True)
        for action, record, value in actions:
            if action == "write":
                file.write(record, {"w": torch.full((value * 1000,), float(value))})
                pending[record] = value
            elif action == "commit":
                step += 1
                file.commit(step)
                committed, pending = {**committed, **pending}, {}
            elif action == "discard":
                file.discard()
                pending = {}
            elif action == "prefetch":
                file.prefetch(record)
            else:
                file.close()
                file = BucketFile(folder, "test", SIZES, resume=True)
                pending = {}
            expected = {**committed, **pending}
            assert {name for name in SIZES if name in file} == set(expected)
            for name, each in expected.items():
                loaded = file.read(name)
                assert torch.equal(loaded.tensors["w"], torch.full((each * 1000,), float(each)))
                file.release(loaded)
            assert file.step == step
        file.close()


def test_tensors_changed_in_place_are_written_from_where_they_lie(tmp_path: Path) -> None:
    with opened(tmp_path, temporary=True) as file:
        file.write("a", content(1))
        loaded = file.read("a")
        tensors = dict(loaded.tensors)
        assert loaded.holds(tensors)
        assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors.values())
        tensors["w"].fill_(2)
        tensors["step"].fill_(2)
        file.write("a", tensors, loaded)
        assert value_of(file, "a") == 2


def test_two_tensors_that_change_places_keep_their_values(tmp_path: Path) -> None:
    with opened(tmp_path, temporary=True) as file:
        file.write("a", {"x": torch.zeros(9), "y": torch.ones(9)})
        loaded = file.read("a")
        file.write("a", {"x": loaded.tensors["y"], "y": loaded.tensors["x"]}, loaded)
        again = file.read("a")
        assert torch.equal(again.tensors["x"], torch.ones(9)) and torch.equal(again.tensors["y"], torch.zeros(9))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(5, 4).t(),
        torch.randn(8, 8)[:, ::2],
        torch.randn(3).to(torch.bfloat16),
        torch.randn(4, dtype=torch.complex64),
        torch.tensor([True, False]),
    ],
    ids=["channels last", "transposed", "with gaps", "bfloat16", "complex", "bool"],
)
def test_dtypes_and_dense_strides_survive(tmp_path: Path, tensor: torch.Tensor) -> None:
    with opened(tmp_path) as file:
        file.write("a", {"t": tensor})
        file.commit(1)
    with opened(tmp_path, resume=True) as file:
        found = file.read("a").tensors["t"]
        assert torch.equal(found, tensor) and found.dtype == tensor.dtype
        assert found.stride() == tensor.clone().stride()


def test_a_record_can_be_read_straight_to_a_place_of_the_callers(tmp_path: Path) -> None:
    import mmap

    with opened(tmp_path) as file:
        file.write("a", content(7))
        memory = mmap.mmap(-1, record_bytes(content(7).values()))
        layout = file.read_into("a", memoryview(memory))
        place = next(place for place in layout.places if place.name == "w")
        assert torch.equal(place.view(memory), content(7)["w"])


def test_memory_is_that_of_three_records(tmp_path: Path) -> None:
    sizes = {str(i): 1 << 20 for i in range(8)}
    file = BucketFile(tmp_path, "test", sizes, temporary=True)
    for step in range(2):
        for i in range(8):
            for ahead in range(i, 8):
                file.prefetch(str(ahead))
            loaded = file.read(str(i)) if str(i) in file else None
            tensors = loaded.tensors if loaded else {"w": torch.zeros(1 << 18)}
            file.write(str(i), dict(tensors), loaded)
        file.commit(step + 1)
    assert file.buffer_peak <= 3 << 20
    assert (file.bytes_written, file.bytes_read) == (16 << 20, 8 << 20)
    file.close()


@pytest.mark.parametrize("direct", [True, False])
def test_the_page_cache_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    if not direct:
        monkeypatch.setattr(StorageFile, "_try_direct", lambda self: None)
    file = BucketFile(tmp_path, "test", {"a": 4 << 20})
    assert direct or not file._file.direct
    file.write("a", {"w": torch.arange(1 << 20)[: 1 << 19]})
    file.drain_writes()
    assert cached_bytes(tmp_path / "test.records") <= 64 << 10
    loaded = file.read("a")
    assert torch.equal(loaded.tensors["w"], torch.arange(1 << 19))
    assert cached_bytes(tmp_path / "test.records") <= 64 << 10
    file.close()


def test_somebodys_records_are_not_overwritten(tmp_path: Path) -> None:
    with opened(tmp_path, fingerprint="one") as file:
        file.write("a", content(1))
        file.commit(1)
    with pytest.raises(UsageError, match="resume=True"):
        BucketFile(tmp_path, "test", SIZES, fingerprint="one")
    with pytest.raises(TrainingError, match="another"):
        BucketFile(tmp_path, "test", SIZES, fingerprint="two", resume=True)
    with opened(tmp_path, fingerprint="one", resume=True) as file:
        assert value_of(file, "a") == 1


def test_records_never_committed_are_nobodys(tmp_path: Path) -> None:
    with opened(tmp_path) as file:
        file.write("a", content(1))
    assert os.listdir(tmp_path) == []
    (tmp_path / "test.records").write_bytes(b"left behind by a kill")
    with opened(tmp_path) as file:
        assert "a" not in file


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(SpillError, match="another process"):
        BucketFile(tmp_path, "test", SIZES, resume=True)


def test_temporary_records_have_no_name(tmp_path: Path) -> None:
    with opened(tmp_path, temporary=True, generations=1) as file:
        file.write("a", content(1))
        file.commit(1)
        assert os.listdir(tmp_path) == []
        shutil.rmtree(tmp_path)
        assert value_of(file, "a") == 1


def test_a_damaged_header_is_told(tmp_path: Path) -> None:
    with opened(tmp_path) as file:
        file.write("a", content(1))
        file.commit(1)
    header = tmp_path / "test.json"
    header.write_bytes(header.read_bytes().replace(b'"step":1', b'"step":2'))
    with pytest.raises(SpillError, match="damaged"):
        BucketFile(tmp_path, "test", SIZES, resume=True)


@pytest.mark.parametrize("record", ["a", "c"])
def test_a_damaged_record_is_told_when_it_is_gone_on_from(tmp_path: Path, record: str) -> None:
    with opened(tmp_path) as file:
        for name in SIZES:
            file.write(name, content(1))
        file.commit(1)
        file.write("b", content(2))
        file.commit(2)
        at = file._slot(record).at + 100
    data = tmp_path / "test.records"
    with data.open("r+b") as raw:
        raw.seek(at)
        raw.write(b"\x7f")
    before = data.read_bytes()
    for _ in range(2):
        with pytest.raises(SpillError, match=r"test\.records is damaged.*delete"):
            BucketFile(tmp_path, "test", SIZES, resume=True)
    assert data.read_bytes() == before
    with opened(tmp_path, resume=True, generation=1) as file:  # whoever names a commit has looked
        assert (file.step, value_of(file, "b")) == (1, 1)


def test_data_without_which_a_header_is_nothing_are_not_made_up(tmp_path: Path) -> None:
    with opened(tmp_path) as file:
        file.write("a", content(1))
        file.commit(1)
    (tmp_path / "test.records").unlink()
    with pytest.raises(SpillError, match="cut short"):
        BucketFile(tmp_path, "test", SIZES, resume=True)
    assert os.listdir(tmp_path) == ["test.json"]


def test_deferred_files_are_made_by_the_first_write(tmp_path: Path) -> None:
    folder = tmp_path / "made later"
    with opened(folder, deferred=True) as file:
        assert not folder.exists() and file.file_bytes == 2 * sum((8192, 4096, 40_960))
        assert "a" not in file and not file.prefetch("a")
        file.write("a", content(1))
        assert (folder / "test.records").stat().st_size == file.file_bytes
        assert value_of(file, "a") == 1
        file.withdraw()
        assert os.listdir(folder) == [] and "a" not in file
        file.open()
        file.write("b", content(2))
        file.commit(1)
    with pytest.raises(SpillError, match="closed"):
        file.write("b", content(3))
    with pytest.raises(UsageError, match="resume=True"):
        BucketFile(folder, "test", SIZES, deferred=True)
    with opened(folder, resume=True) as file:
        assert (value_of(file, "a"), value_of(file, "b")) == (None, 2)


def test_a_file_cut_short_is_told(tmp_path: Path) -> None:
    with opened(tmp_path) as file:
        file.write("c", content(1))
        file.commit(1)
        os.truncate(tmp_path / "test.records", 4096)
        with pytest.raises(SpillError, match="cut short"):
            file.read("c")
    with pytest.raises(SpillError, match="cut short"):
        BucketFile(tmp_path, "test", SIZES, resume=True)


def test_a_folder_that_goes_away_is_told_at_the_commit(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    file = BucketFile(folder, "test", SIZES)
    file.write("a", content(1))
    shutil.rmtree(folder)
    with pytest.raises(SpillError, match="folder"):
        file.commit(1)
    file.close()


def test_a_limit_on_file_sizes_is_met_before_anything_is_written(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(SpillError, match="reserving"):
            BucketFile(tmp_path / "new", "test", {"a": 4 << 20})
        with pytest.raises(SpillError, match="reserving"):
            BucketFile(tmp_path, "test", {"a": 4 << 20}, temporary=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_told_and_nothing_is_left_on_it(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from narrowboat.train.state.buckets import BucketFile\n"
        "from narrowboat.errors import SpillError\n"
        "for temporary in (False, True):\n"
        "    try:\n"
        "        BucketFile(sys.argv[1], 'test', {'a': 4 << 20}, temporary=temporary)\n"
        "    except SpillError as error:\n"
        "        print(error)\n"
        "print(os.listdir(sys.argv[1]), os.statvfs(sys.argv[1]).f_bfree * 4096)\n"
    )
    mount = f'mount -t tmpfs -o size=1m none {tmp_path} && exec {sys.executable} -c "$CODE" {tmp_path}'
    command = ["unshare", "--mount", "sh", "-c", mount]
    if shutil.which("unshare") is None or subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("no mount namespace of our own to fill a disk in")
    done = subprocess.run(command, env={**os.environ, "CODE": code}, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    assert "No space left" in lines[0] and "No space left" in lines[1]
    assert lines[2] == f"[] {1 << 20}"


def test_a_write_that_fails_is_told_and_the_last_commit_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with opened(tmp_path) as file:
        file.write("a", content(1))
        file.commit(1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", fail)
            file.write("a", content(2))
            with pytest.raises(SpillError, match="Input/output error"):
                file.commit(2)
        file.discard()
        assert (file.step, value_of(file, "a")) == (1, 1)
        file.write("a", content(3))
        file.commit(2)
    with opened(tmp_path, resume=True) as file:
        assert value_of(file, "a") == 3


@pytest.mark.parametrize("after", [False, True], ids=["before the rename", "after the rename"])
def test_an_interruption_of_a_commit_leaves_one_of_the_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    replace = os.replace

    def interrupted(*arguments: object) -> None:
        if after:
            replace(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with opened(tmp_path) as file:
        for value in (1, 2):
            file.write("a", content(value))
            file.commit(value)
        file.write("a", content(3))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", interrupted)
            file.commit(3)
        file.write("b", content(9))  # must not touch what counts now, whichever it is
        file.write("a", content(9))
        file.discard()
        counts = 3 if after else 2
        assert (file.step, value_of(file, "a")) == (counts, counts)
    with opened(tmp_path, resume=True) as file:
        assert (file.step, value_of(file, "a")) == (counts, counts)


def test_files_of_one_run_can_be_brought_to_one_step(tmp_path: Path) -> None:
    """One of two was committed when the process died: it goes back to the step that both have."""
    with opened(tmp_path) as file:
        for value in (1, 2):
            file.write("a", content(value))
            file.commit(value)
    with opened(tmp_path, resume=True) as file:
        assert file.steps == (2, 1)
        file.roll_back(2)
        file.roll_back(1)
        assert (file.step, value_of(file, "a")) == (1, 1)
    with opened(tmp_path, resume=True) as file:
        assert (file.step, value_of(file, "a")) == (1, 1)
        file.write("a", content(5))
        with pytest.raises(TrainingError, match="no longer"):
            file.roll_back(0)
