"""Profiles are found by what they depend on, and refused by name where that differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import narrowboat as nb
from narrowboat.errors import ProfileError
from narrowboat.profile.measured import (
    MeasuredProfile,
    identity_of,
    load_profile,
    read_profile,
    save_profile,
    write_profile,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NARROWBOAT_CACHE", str(tmp_path / "cache"))


def profile(**changes: Any) -> MeasuredProfile:
    return MeasuredProfile(
        **{"identity": identity_of("m", "w"), "policy": "default", "step_seconds": [1.0], **changes}
    )


def test_what_was_kept_is_found_again_by_its_identity() -> None:
    made = profile(contention=0.25, bandwidths=[1e9], blocks=[{"name": "a"}], table=[{"policy": "strict"}])
    save_profile(made)
    assert load_profile(identity_of("m", "w")) == made
    assert load_profile(identity_of("other", "w")) is None
    assert load_profile(identity_of("m", "other")) is None


def test_a_profile_that_cannot_be_kept_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("NARROWBOAT_CACHE", str(tmp_path / "file"))
    assert "Not a directory" in save_profile(profile()) or "File exists" in save_profile(profile())


def test_another_number_of_threads_is_another_profile() -> None:
    save_profile(profile())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert load_profile(identity_of("m", "w")) is None
    finally:
        torch.set_num_threads(threads)


def test_a_foreign_profile_is_refused_by_what_differs(tmp_path: Path) -> None:
    write_profile(profile(), tmp_path / "p.json")
    with pytest.raises(ProfileError, match="another weights, another threads"):
        read_profile(tmp_path / "p.json", {**identity_of("m", "x"), "threads": "64"})


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"format": 1}', "\0\1"])
def test_what_is_no_profile_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ProfileError, match="not a profile"):
        read_profile(tmp_path / "p.json", {})
    with pytest.raises(ProfileError, match="No such file"):
        read_profile(tmp_path / "missing.json", {})


@pytest.mark.parametrize("change", [{"format": 99}, {"policy": "lax"}, {"step_seconds": [-1]}, {"contention": "NaN"}])
def test_values_that_cannot_be_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    write_profile(profile(), tmp_path / "p.json")
    raw = json.loads((tmp_path / "p.json").read_text())
    (tmp_path / "p.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises(ProfileError, match="not a profile"):
        read_profile(tmp_path / "p.json", identity_of("m", "w"))


def test_a_session_keeps_what_it_measured_and_the_next_one_begins_with_it(deep: Any) -> None:
    model = deep.stream()
    assert deep.right(model, 4)
    kept = nb.session(model).prepared.measured
    assert kept is not None
    assert sum(kept.step_seconds) > 0
    assert load_profile(kept.identity) == kept
    nb.session(model).close()
    again = nb.session(deep.stream()).prepared
    assert list(again.step_seconds) == kept.step_seconds
    assert again.measured_under is not None


def test_a_kept_profile_that_was_damaged_is_measured_anew(deep: Any, tmp_path: Path) -> None:
    model = deep.stream()
    assert deep.right(model, 3)
    nb.session(model).close()
    for path in (tmp_path / "cache" / "profiles").iterdir():
        path.write_text(path.read_text()[:-20])
    again = deep.stream()
    assert nb.session(again).prepared.measured_under is None
    assert deep.right(again, 2)
