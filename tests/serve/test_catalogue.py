"""Which tasks a gateway knows, and what it refuses to know."""

from __future__ import annotations

from pathlib import Path

import pytest

from narrowboat.errors import BadRequestError, NoSuchTaskError, TasksChangedError, TaskSpecError
from narrowboat.serve.catalogue import Catalogue

TASKS = "budget: 10MiB\ntasks:\n  - {name: one, model: 'zoo:resnet18', weights: one.safetensors, period: 1s}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tasks.yaml"
    path.write_text(TASKS)
    return path


def models(tmp_path: Path, line: str, name: str = "more.yaml") -> Path:
    folder = tmp_path / "models"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"budget: 1MiB\ntasks:\n  - {{name: two, period: 1s, {line}}}\n")
    return folder


def test_tasks_of_the_folder_are_known_and_do_not_run_from_the_start(file: Path, tmp_path: Path) -> None:
    folder = models(tmp_path, "model: 'zoo:resnet18', weights: w/two.safetensors, input: {file: x.png}")
    known = Catalogue(file, folder)
    assert known.first == ("one",) and set(known.specs) == {"one", "two"}
    two = known.spec("two")
    assert two.weights == str(folder / "w/two.safetensors")
    assert two.input is not None and two.input.file == str(folder / "x.png")


@pytest.mark.parametrize(
    "line",
    [
        "model: 'zoo:resnet18', weights: ../one.safetensors",
        "model: 'zoo:resnet18', weights: /etc/passwd",
        "model: 'zoo:resnet18', weights: w.safetensors, labels: ../../secrets.txt",
        "model: 'zoo:resnet18', weights: w.safetensors, input: {file: /etc/passwd}",
        "model: 'zoo:resnet18', weights: w.safetensors, input: {folder: ..}",
        "model: ../elsewhere",
        "model: 'text:../elsewhere?window=8'",
        "model: 'text:/etc?window=8'",
        "model: 'os:system', weights: w.safetensors",
        "model: 'zoo:resnet18', weights: w.safetensors, input: {generator: 'os:getcwd'}",
    ],
)
def test_nothing_leads_out_of_the_folder_and_no_code_is_named_in_it(file: Path, tmp_path: Path, line: str) -> None:
    with pytest.raises(TaskSpecError, match=r"outside of the models' folder|is zoo:NAME or a folder|is code"):
        Catalogue(file, models(tmp_path, line))


def test_a_link_out_of_the_folder_is_followed_before_it_is_judged(file: Path, tmp_path: Path) -> None:
    folder = models(tmp_path, "model: 'zoo:resnet18', weights: link.safetensors")
    (tmp_path / "real.safetensors").write_bytes(b"")
    (folder / "link.safetensors").symlink_to(tmp_path / "real.safetensors")
    with pytest.raises(TaskSpecError, match="outside"):
        Catalogue(file, folder)


def test_one_name_means_one_task(file: Path, tmp_path: Path) -> None:
    folder = models(tmp_path, "model: 'zoo:resnet18', weights: w.safetensors")
    (folder / "again.yaml").write_text(TASKS)
    with pytest.raises(TaskSpecError, match="known already"):
        Catalogue(file, folder)


def test_clients_may_say_how_a_task_is_to_run_and_never_what(file: Path) -> None:
    known = Catalogue(file)
    assert known.spec("one", {"period": "2s", "guarantee": "best-effort"}).step == 2_000_000
    contract = known.spec("one", {"contract": {"burst": 2, "period": "1s"}, "deadline": "1s"})
    assert contract.contract is not None and contract.contract.burst == 2
    for fields in ({"model": "os:system"}, {"weights": "/etc/passwd"}, {"input": {"file": "x"}}, {"name": "x"}):
        with pytest.raises(BadRequestError, match="cannot be set by a client"):
            known.spec("one", fields)
    with pytest.raises(BadRequestError, match="period"):
        known.spec("one", {"period": "never"})
    with pytest.raises(NoSuchTaskError):
        known.spec("two")


def test_what_if_may_name_a_model_that_is_known_and_needs_not_say_where_its_weights_are(file: Path) -> None:
    known = Catalogue(file)
    assert known.parse({"name": "x", "model": "zoo:resnet18", "period": "1s"}).weights == "one.safetensors"
    for fields in ({"model": "zoo:vgg19"}, {"model": "zoo:resnet18", "weights": "/etc/passwd"}):
        with pytest.raises(BadRequestError, match="not known here"):
            known.parse({"name": "x", "period": "1s", **fields})


def test_a_file_that_is_not_the_one_that_was_read_is_told(file: Path) -> None:
    known = Catalogue(file)
    known.check_unchanged()
    file.write_text(TASKS + "# a word\n")
    with pytest.raises(TasksChangedError, match="HUP"):
        known.check_unchanged()
    file.write_text(TASKS)
    known.check_unchanged()
    file.unlink()
    with pytest.raises(TasksChangedError, match="cannot read"):
        known.check_unchanged()


def test_labels_come_from_a_file_one_a_line(file: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    file.write_text(TASKS.replace("period", "labels: names.txt, period"))
    assert Catalogue(file).labels("one") == ["cat", "dog"]
    (tmp_path / "names.txt").unlink()
    with pytest.raises(TaskSpecError, match="labels"):
        Catalogue(file).labels("one")
