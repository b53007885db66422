"""Which nodes work at a data set, and what is said of the others. No cluster."""

from __future__ import annotations

import sys

import pytest
import torch

import cluster_dataset_kit as kit
from narrowboat.checkpoint import open_index
from narrowboat.cluster.dataset import map_dataset
from narrowboat.cluster.dataset.nodes import agree, chosen, require_cluster, room
from narrowboat.cluster.dataset.survey import Found, identity
from narrowboat.cluster.facts import versions
from narrowboat.cluster.machines import Machine
from narrowboat.errors import NoClusterError, NodeVersionError, UsageError

MIB = 1 << 20
A, B, NONE = Machine("aa11", "a", 100 * MIB), Machine("bb22", "b", 200 * MIB), Machine("cc33", "c", 0)
NAMES = {"aa11": "a", "bb22": "b"}


def found(weights: str = "w", instructions: str = "AVX2", **other: str) -> Found:
    return Found({**versions(), **other}, instructions, weights)


def test_without_ray_the_pip_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(NoClusterError, match=r"pip install 'narrowboat\[ray\]'"):
        map_dataset(None, kit.deep, "w", budget="1MiB", example=(torch.zeros(1),), columns="x")  # type: ignore[arg-type]


def test_without_a_connection_the_call_is_named() -> None:
    ray = pytest.importorskip("ray")
    if ray.is_initialized():
        pytest.skip("another test of this process is connected")
    with pytest.raises(NoClusterError, match=r"ray\.init"):
        require_cluster()


def test_nodes_are_meant_by_name_by_identity_or_all_that_offer() -> None:
    assert chosen(None, [A, B, NONE]) == [A, B]
    assert chosen(["b", "aa"], [A, B, NONE]) == [B, A]
    with pytest.raises(UsageError, match="no node 'z' in the cluster, which has a, b, c"):
        chosen(["z"], [A, B, NONE])
    with pytest.raises(UsageError, match="a list of their names, not 'a'"):
        chosen("a", [A])
    with pytest.raises(NoClusterError, match=r"ray start .*narrowboat_memory"):
        chosen(None, [NONE])


def test_a_node_has_room_for_one_worker_or_says_why_not() -> None:
    assert room(A, 60 * MIB, 100 * MIB) == (60 * MIB, "")
    assert room(B, None, 200 * MIB) == (200 * MIB, "")
    assert room(A, 150 * MIB, 100 * MIB)[1] == "it offers 100 MiB, and the budget is 150 MiB"
    assert room(A, 60 * MIB, 10 * MIB)[1] == "of the 100 MiB that it offers 10.0 MiB are free"
    assert room(NONE, 60 * MIB, 0)[1] == "it offers no narrowboat_memory"


def test_nodes_that_would_give_other_bits_are_named() -> None:
    assert agree(NAMES, {"aa11": found(), "bb22": found()}, same_bits=True).instructions == "AVX2"
    with pytest.raises(NodeVersionError, match=r"b has torch 1\.0 instead of"):
        agree(NAMES, {"aa11": found(), "bb22": found(torch="1.0")}, same_bits=True)
    with pytest.raises(NodeVersionError, match="not the same on all nodes: one on a; two on b"):
        agree(NAMES, {"aa11": found("one"), "bb22": found("two")}, same_bits=True)
    unlike = {"aa11": found(), "bb22": found(instructions="AVX512")}
    with pytest.raises(NodeVersionError, match="AVX2 on a; AVX512 on b"):
        agree(NAMES, unlike, same_bits=True)
    assert agree(NAMES, unlike, same_bits=False).instructions == ""


def test_weights_are_the_same_wherever_their_file_lies(tmp_path_factory: pytest.TempPathFactory) -> None:
    here, there, other = (tmp_path_factory.mktemp(name) for name in ("here", "there", "other"))
    kit.write(kit.pixels, here / "w.safetensors")
    kit.write(kit.pixels, there / "w.safetensors")
    kit.write(kit.pixels, other / "w.safetensors", seed=1)
    one, two, three = (identity(open_index(path / "w.safetensors")) for path in (here, there, other))
    assert one == two != three
    plain = [path / "w.pth" for path in (here, there, other)]
    for path, seed in zip(plain, (0, 0, 1), strict=True):
        torch.manual_seed(seed)
        torch.save(kit.pixels().state_dict(), path)
    one, two, three = (identity(open_index(path)) for path in plain)
    assert one == two != three
