"""What is built holds what it should and nothing else, and knows what it was built from."""

from __future__ import annotations

import json
import tarfile
import zipfile
from collections.abc import Iterator
from email import message_from_string
from pathlib import Path

import pytest

from narrowboat import __version__
from packaging_kit import LEFTOVERS, ROOT, Built, build, git, run

MIB = 1 << 20


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    yield build(tmp_path_factory.mktemp("build"))


def _names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def _read(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name).decode()


def _sdist_names(sdist: Path) -> dict[str, int]:
    with tarfile.open(sdist) as archive:
        return {m.name.partition("/")[2]: m.size for m in archive.getmembers() if m.isfile()}


def test_the_wheel_holds_every_module_and_every_file_that_they_read(built: Built) -> None:
    names = set(_names(built.wheel))
    wanted = {
        str(path.relative_to(built.checkout / "src"))
        for path in (built.checkout / "src" / "narrowboat").rglob("*")
        if path.is_file() and path.suffix not in {".pyc"}
    }
    assert wanted <= names
    assert {"narrowboat/py.typed", "narrowboat/serve/page/static/index.html", "narrowboat/_build.json"} <= names


def test_the_wheel_holds_no_tests_and_nothing_that_earlier_builds_left(built: Built) -> None:
    strangers = [
        name
        for name in _names(built.wheel)
        if not name.startswith(("narrowboat/", f"narrowboat-{__version__}.dist-info/"))
        and not name.startswith(f"narrowboat-{__version__}.data/data/share/")
    ]
    assert strangers == []
    assert not [name for name in _names(built.wheel) if "left" in name or "/tests/" in name]


def test_the_wheel_has_the_manual_and_the_shells_scripts_where_they_are_looked_for(built: Built) -> None:
    share = f"narrowboat-{__version__}.data/data/share"
    names = set(_names(built.wheel))
    for file in (
        "man/man1/narrowboat.1",
        "man/man1/narrowboat-serve.1",
        "bash-completion/completions/narrowboat.bash",
        "zsh/site-functions/_narrowboat",
        "fish/vendor_completions.d/narrowboat.fish",
    ):
        assert f"{share}/{file}" in names


def test_the_metadata_name_the_version_of_the_package(built: Built) -> None:
    told = message_from_string(_read(built.wheel, f"narrowboat-{__version__}.dist-info/METADATA"))
    assert (told["Name"], told["Version"], told["License-Expression"]) == ("narrowboat", __version__, "Apache-2.0")
    assert {"hf", "plot", "serve", "train", "demo"} <= set(told.get_all("Provides-Extra", []))


def test_both_carry_the_commit_they_were_built_from(built: Built) -> None:
    from_wheel = json.loads(_read(built.wheel, "narrowboat/_build.json"))
    with tarfile.open(built.sdist) as archive:
        name = next(name for name in archive.getnames() if name.endswith("src/narrowboat/_build.json"))
        file = archive.extractfile(name)
        assert file is not None
        from_sdist = json.loads(file.read())
    for facts in (from_wheel, from_sdist):  # the wheel was built from the source distribution, which has no git
        assert (facts["commit"], facts["modified"]) == (built.commit, False)
        assert facts["built"].endswith("Z")


def test_the_checkout_is_left_without_the_record(built: Built) -> None:
    assert not (built.checkout / "src" / "narrowboat" / "_build.json").exists()
    assert git(built.checkout, "status", "--porcelain").strip() == ""


def test_the_source_distribution_holds_what_a_distributor_needs(built: Built) -> None:
    names = _sdist_names(built.sdist)
    wanted = ["LICENSE", "README.md", "CHANGELOG.md", "constraints.txt", "Makefile", "pyproject.toml", "setup.py"]
    wanted += ["docs/install.md", "tests/conftest.py", "tests/test_house.py", "tests/packaging_kit.py"]
    wanted += ["packaging/Containerfile", "packaging/narrowboat.service", "packaging/man/narrowboat.1"]
    wanted += ["examples/robot/tasks.yaml", "benchmarks/inference.py", "docs/images/serve-light.png"]
    assert [name for name in wanted if name not in names] == []


def test_the_source_distribution_holds_nothing_that_git_ignores(built: Built) -> None:
    names = _sdist_names(built.sdist)
    made = {"PKG-INFO", "setup.cfg", "src/narrowboat/_build.json"}
    kept = set(git(built.checkout, "ls-files").splitlines())
    strangers = [name for name in names if name not in kept | made and not name.startswith("src/narrowboat.egg-info/")]
    assert strangers == []
    assert not set(LEFTOVERS) & set(names)
    assert built.sdist.stat().st_size < 30 * MIB


def test_every_tracked_file_is_in_the_source_distribution_or_for_git_alone(built: Built) -> None:
    missing = set(git(built.checkout, "ls-files").splitlines()) - set(_sdist_names(built.sdist))
    assert missing <= {".gitignore", ".gitattributes", ".mailmap"}


@pytest.mark.parametrize("tool", ["twine", "check_wheel_contents"])
def test_checkers_find_nothing(built: Built, tool: str) -> None:
    import sys

    pytest.importorskip(tool)
    if tool == "twine":
        run(sys.executable, "-m", "twine", "check", "--strict", built.wheel, built.sdist)
    else:
        run(sys.executable, "-m", "check_wheel_contents", built.wheel, cwd=ROOT)
