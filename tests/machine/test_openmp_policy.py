"""The OpenMP policy: what is set, what is left alone, what is told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowboat.machine.cpu import usable_cores
from narrowboat.machine.openmp import (
    OpenMPChoice,
    apply_openmp_policy,
    choice_path,
    load_choice,
    openmp_status,
    save_choice,
)
from narrowboat.machine.openmp_measure import OpenMPRow, choose, measure_openmp_policies, thread_counts


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"NARROWBOAT_CACHE": str(tmp_path / "cache")}


def test_a_short_spin_is_set_where_nothing_is_known(environ: dict[str, str]) -> None:
    applied = apply_openmp_policy(environ)
    assert environ["GOMP_SPINCOUNT"] == "1000"
    assert "OMP_NUM_THREADS" not in environ
    assert applied.source == "built-in"


@pytest.mark.parametrize(("name", "value"), [("GOMP_SPINCOUNT", "77"), ("OMP_WAIT_POLICY", "active")])
def test_what_the_user_set_is_left_alone(environ: dict[str, str], name: str, value: str) -> None:
    environ[name] = value
    before = dict(environ)
    applied = apply_openmp_policy(environ)
    assert environ == before
    assert applied.source == "user"


def test_a_measured_choice_is_used(environ: dict[str, str]) -> None:
    save_choice(OpenMPChoice("passive", 3, usable_cores()), choice_path(environ))
    applied = apply_openmp_policy(environ)
    assert applied.variables == {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "3"}
    assert applied.source == "measured"


def test_a_thread_count_of_the_user_wins_over_the_measured(environ: dict[str, str]) -> None:
    save_choice(OpenMPChoice("10000", 3, usable_cores()), choice_path(environ))
    environ["OMP_NUM_THREADS"] = "5"
    apply_openmp_policy(environ)
    assert (environ["OMP_NUM_THREADS"], environ["GOMP_SPINCOUNT"]) == ("5", "10000")


def test_a_choice_of_another_machine_size_is_not_used(environ: dict[str, str]) -> None:
    path = save_choice(OpenMPChoice("passive", None, 64), choice_path(environ))
    assert load_choice(path, cores=2) is None
    assert load_choice(path, cores=64) == OpenMPChoice("passive", None, 64)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"policy": "rm -rf", "threads": null, "cores": 2}',
        '{"policy": "1", "threads": 0, "cores": 2}',
    ],
)
def test_a_damaged_choice_is_no_choice(tmp_path: Path, text: str) -> None:
    path = tmp_path / "openmp.json"
    path.write_text(text)
    assert load_choice(path, cores=2) is None


@given(
    st.sampled_from(["default", "passive"]) | st.integers(0, 10**9).map(str),
    st.none() | st.integers(1, 512),
    st.integers(1, 512),
)
def test_a_saved_choice_comes_back(
    tmp_path_factory: pytest.TempPathFactory, policy: str, threads: int | None, cores: int
) -> None:
    choice = OpenMPChoice(policy, threads, cores)
    path = save_choice(choice, tmp_path_factory.mktemp("cache") / "openmp.json")
    assert load_choice(path, cores=cores) == choice
    assert [file.name for file in path.parent.iterdir()] == ["openmp.json"]


def test_importing_the_policy_does_not_import_torch() -> None:
    script = "import sys, narrowboat.machine.openmp, narrowboat.machine.doctor; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "False\n"
    )


def test_setting_it_after_torch_was_loaded_is_said_to_have_no_effect() -> None:
    script = (
        "import os, sys, types; sys.modules['torch'] = types.ModuleType('torch')\n"
        "from narrowboat.machine.openmp import apply_openmp_policy\n"
        "[os.environ.pop(name, None) for name in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')]\n"
        "print(apply_openmp_policy().effective)\n"
    )
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "False\n"
    )


def test_the_default_is_risky_on_few_cores_and_says_what_to_do() -> None:
    status = openmp_status({}, cores=2, threads=2)
    assert status.risky
    assert "GOMP_SPINCOUNT=1000" in status.advice


@pytest.mark.parametrize(
    ("variables", "cores", "threads"),
    [
        ({"GOMP_SPINCOUNT": "1000"}, 2, 2),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, 2, 2),
        ({"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "1000"}, 2, 2),
        ({}, 2, 1),
        ({}, 4, 3),
        ({}, 64, 64),
    ],
)
def test_not_risky(variables: dict[str, str], cores: int, threads: int) -> None:
    status = openmp_status(variables, cores=cores, threads=threads)
    assert not status.risky
    assert status.advice == ""


@pytest.mark.parametrize(
    "variables", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "INFINITY"}, {"GOMP_SPINCOUNT": "30000000000"}]
)
def test_a_long_spin_asked_for_is_as_risky(variables: dict[str, str]) -> None:
    assert openmp_status(variables, cores=2, threads=2).risky


def test_the_choice_weighs_alone_and_busy_alike() -> None:
    rows = [OpenMPRow("default", 2, 1.0, 9.0), OpenMPRow("10000", 2, 1.2, 3.0), OpenMPRow("passive", 2, 2.0, 2.5)]
    assert choose(rows, 2) == OpenMPChoice("10000", None, 2)


def test_a_difference_within_the_noise_keeps_the_built_in_policy() -> None:
    rows = [OpenMPRow("passive", 2, 1.0, 1.0), OpenMPRow("1000", 2, 1.01, 1.01), OpenMPRow("1000", 1, 1.0, 1.0)]
    assert choose(rows, 2) == OpenMPChoice("1000", None, 2)


@given(st.integers(1, 256))
def test_thread_counts_go_from_all_cores_down_to_one(cores: int) -> None:
    counts = thread_counts(cores)
    assert counts[0] == cores and counts[-1] == 1
    assert counts == sorted(set(counts), reverse=True)


def test_a_measurement_gives_a_row_per_setting_and_a_usable_choice() -> None:
    told: list[str] = []
    result = measure_openmp_policies(cores=1, policies=("1000",), seconds=0.01, repeats=1, progress=told.append)
    assert [(row.policy, row.threads) for row in result.rows] == [("1000", 1)]
    assert all(row.alone > 0 and row.busy > 0 for row in result.rows)
    assert result.choice == OpenMPChoice("1000", None, 1)
    assert told
    json.dumps(result.choice.environment())
