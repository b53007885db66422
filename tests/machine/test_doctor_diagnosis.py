"""The doctor's sentences, and the document for machines."""

import dataclasses
import json
from pathlib import Path

import pytest

from narrowboat.machine import doctor
from narrowboat.machine.cpu import CpuSupply
from narrowboat.machine.cuda import CudaDevice, CudaSupport
from narrowboat.machine.hugepages import HugePages
from narrowboat.machine.openmp import OpenMPChoice, openmp_status
from narrowboat.machine.realtime import MemoryLocking, RealtimePriority
from narrowboat.machine.storage import StorageProbe, StorageRow, probe_storage

MIB = 1 << 20
PROBE = StorageProbe(
    "weights", "ext4", True, "", False, 64 * MIB, 0, 2e8, (StorageRow(MIB, 2, False, 9e8, 0.001),), MIB, 2, 9e8, 8e8
)
CARD = CudaDevice("Card", 8 << 30, 7 << 30, True, False)
OLD_CARD = dataclasses.replace(CARD, virtual_memory=False)
BOARD = dataclasses.replace(CARD, virtual_memory=False, integrated=True)


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NARROWBOAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        doctor,
        "probe_storage",
        lambda folder, *, quick, progress: probe_storage(folder, quick=quick, sample=MIB, progress=progress),
    )
    folder = tmp_path / "weights"
    folder.mkdir()
    return folder


def test_a_diagnosis_is_a_json_document_with_its_sentences(quick: Path) -> None:
    told: list[str] = []
    diagnosis = doctor.diagnose(quick, quick=True, measure_openmp=False, progress=told.append)
    document = json.loads(json.dumps(diagnosis.to_json(), allow_nan=False))
    assert document["memory"]["available"] == diagnosis.memory.available
    assert document["storage"]["bandwidth"] > 0
    assert document["cpu"]["cores"] >= 1
    titles = [finding["title"] for finding in document["findings"]]
    assert len(titles) == len(set(titles)) == 10
    assert all(finding["meaning"] for finding in document["findings"])
    assert any("storage" in what for what in told)
    assert list(quick.iterdir()) == []


def test_a_measured_choice_is_kept_for_later_processes(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = OpenMPChoice("10000", None, doctor.cpu_supply().cores)
    monkeypatch.setattr(doctor, "measure_openmp_policies", lambda progress: doctor.OpenMPMeasurement((), choice))
    doctor.diagnose(quick, quick=True, remember=False)
    assert doctor.load_choice() is None
    diagnosis = doctor.diagnose(quick, quick=True)
    assert doctor.load_choice() == choice == diagnosis.openmp_choice


def test_a_choice_that_cannot_be_kept_is_told(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = quick.parent / "blocked"
    blocked.write_text("")
    monkeypatch.setenv("NARROWBOAT_CACHE", str(blocked))
    choice = OpenMPChoice("10000", None, 2)
    monkeypatch.setattr(doctor, "measure_openmp_policies", lambda progress: doctor.OpenMPMeasurement((), choice))
    findings = {finding.title: finding for finding in doctor.diagnose(quick, quick=True).findings}
    assert findings["OpenMP"].state == "warn"
    assert "NARROWBOAT_CACHE" in findings["OpenMP"].advice


@pytest.mark.parametrize(
    ("finding", "state", "word"),
    [
        (doctor.cpu_finding(CpuSupply("x", 4, 4, 2, None, ("avx2",))), "ok", "avx2"),
        (doctor.cpu_finding(CpuSupply("x", 4, 4, 2, 1.5, ())), "warn", "quota of 1.5"),
        (doctor.storage_finding(PROBE), "ok", "O_DIRECT works"),
        (doctor.storage_finding(dataclasses.replace(PROBE, direct=False, reason="refused")), "warn", "page cache"),
        (doctor.storage_finding(dataclasses.replace(PROBE, in_memory=True)), "warn", "beside the budget"),
        (doctor.storage_finding(dataclasses.replace(PROBE, bandwidth=4e7)), "warn", "wait for the storage"),
        (doctor.huge_pages_finding(HugePages("never", 0)), "absent", "never"),
        (doctor.huge_pages_finding(HugePages("absent", 0)), "absent", "kernel has none"),
        (doctor.huge_pages_finding(HugePages("madvise", 2 * MIB)), "ok", "2.00 MiB"),
        (doctor.locking_finding(MemoryLocking(True, None)), "ok", "any amount"),
        (doctor.locking_finding(MemoryLocking(True, 8 * MIB)), "warn", "8.00 MiB"),
        (doctor.locking_finding(MemoryLocking(False, 0)), "absent", "swap"),
        (doctor.realtime_finding(RealtimePriority(True, 99, 0.95, "")), "ok", "95%"),
        (
            doctor.realtime_finding(RealtimePriority(False, 0, 0.95, "Operation not permitted")),
            "absent",
            "not guaranteed",
        ),
        (doctor.cuda_finding(CudaSupport((), "torch is built without CUDA")), "absent", "without CUDA"),
        (doctor.cuda_finding(CudaSupport((CARD,), "", "13.0", "13.5.0")), "ok", "Card (7.00 GiB of 8.00 GiB free)"),
        (doctor.cuda_finding(CudaSupport((CARD,), "", "13.0", "13.5.0")), "ok", "CUDA 13.0, bindings 13.5.0"),
        (doctor.cuda_finding(CudaSupport((CARD,), "", "12.4")), "warn", "no bindings"),
        (doctor.cuda_finding(CudaSupport((OLD_CARD,), "", "12.4", "12.9.0")), "warn", "no virtual memory"),
        (doctor.cuda_finding(CudaSupport((BOARD,), "", "12.4", "12.9.0")), "ok", "shares memory with the host"),
        (doctor.allocator_finding("glibc"), "ok", "glibc"),
        (doctor.allocator_finding("jemalloc"), "warn", "jemalloc"),
        (doctor.cgroup_finding(None), "ok", "enforces"),
        (doctor.cgroup_finding("read-only file system"), "absent", "read-only"),
        (doctor.openmp_finding(openmp_status({}, cores=2, threads=2), None), "warn", "spin"),
        (
            doctor.openmp_finding(openmp_status({"GOMP_SPINCOUNT": "1000"}, cores=2, threads=2), None),
            "ok",
            "1000 rounds",
        ),
    ],
)
def test_what_each_finding_means_is_said(finding: doctor.Finding, state: str, word: str) -> None:
    assert finding.state == state
    assert word in finding.meaning


@pytest.mark.parametrize(
    ("choice", "word"),
    [
        (None, "not measured"),
        (OpenMPChoice("1000", None, 2), "best here"),
        (OpenMPChoice("passive", None, 2), "another"),
    ],
)
def test_the_policy_in_force_is_never_called_measured_when_another_was_better(
    choice: OpenMPChoice | None, word: str
) -> None:
    assert word in doctor.openmp_finding(openmp_status({"GOMP_SPINCOUNT": "1000"}, cores=2, threads=2), choice).meaning
