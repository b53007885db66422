"""Rows as inputs, outputs as columns: shapes, types, gaps, and names for what cannot be used. No cluster."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import cluster_dataset_kit  # noqa: F401 (before Ray)

pytest.importorskip("ray.data", reason="data sets over a cluster need narrowboat[ray]")
import pyarrow as pa

from narrowboat.cluster.dataset.columns import values_of, with_columns
from narrowboat.cluster.dataset.outputs import columns_of, name_outputs
from narrowboat.cluster.dataset.rows import Rows, feeds_of
from narrowboat.cluster.dataset.wire import nbytes, pack, unpack
from narrowboat.errors import RowError, UsageError

FLOATS = (torch.zeros(1, 3),)


def rows(columns: Any = "x", example: Any = FLOATS, **more: Any) -> Rows:
    return Rows(feeds_of(columns, example), example, **more)


def test_lists_of_any_length_become_inputs_with_a_leading_dimension() -> None:
    table = pa.table({"id": [7, 8], "x": [[1.0, 2.0, 3.0], [4.0, 5.0]]})
    first, second = rows().inputs(table)
    assert torch.equal(first[0], torch.tensor([[1.0, 2.0, 3.0]])) and first[0].dtype is torch.float32
    assert torch.equal(second[0], torch.tensor([[4.0, 5.0]]))


def test_numbers_are_read_exactly_beside_gaps() -> None:
    large = (1 << 60) + 1  # which a float cannot hold
    assert values_of(pa.table({"x": [large, None]}), "x") == [large, None]


def test_what_the_example_has_beside_columns_is_passed_on() -> None:
    example = {"ids": torch.zeros(1, 2, dtype=torch.int64), "use_cache": False}
    made = rows({"ids": "words"}, example).inputs(pa.table({"words": [[1, 2]]}))
    assert made[0]["use_cache"] is False and torch.equal(made[0]["ids"], torch.tensor([[1, 2]]))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([[1.0, 2.0], None], r"row 1 of a batch of 2 \(id=8\), column 'x': it is None"),
        ([[1.0], [None]], r"row 1 .*, column 'x': it holds"),
        ([[1, 2], [3, 4]], r"row 0 .* it holds int64, and the model takes float32: give prepare="),
        (["text", "more"], r"row 0 .* give prepare="),
    ],
)
def test_a_row_that_cannot_be_an_input_is_named_with_its_column(values: list[Any], said: str) -> None:
    with pytest.raises(RowError, match=said):
        rows().inputs(pa.table({"id": [7, 8], "x": values}))


def test_a_failing_prepare_names_the_row() -> None:
    def halve(row: dict[str, Any]) -> torch.Tensor:
        return torch.tensor([[1.0 / int(row["x"])]])

    with pytest.raises(RowError, match=r"row 1 of a batch of 2 .*prepare failed: ZeroDivisionError"):
        Rows((), FLOATS, prepare=halve).inputs(pa.table({"x": [1, 0]}))


def test_columns_that_feed_the_model_are_not_carried_unless_kept() -> None:
    table = pa.table({"id": [1], "x": [[1.0]], "y": ["a"]})
    assert rows().carried(table).column_names == ["id", "y"]
    assert rows(keep=("x",)).carried(table).column_names == ["x"]
    with pytest.raises(UsageError, match="no column 'z'; it has id, x, y"):
        rows("z").inputs(table)


@pytest.mark.parametrize(
    ("columns", "example", "said"),
    [
        (None, FLOATS, "columns= is missing"),
        (["x", "y"], FLOATS, "column 'y' is to feed argument 1"),
        ("x", {"ids": torch.zeros(1)}, "columns has to be one too"),
        ("x", (torch.zeros(1), torch.zeros(1)), "no column feeds argument 1"),
    ],
)
def test_columns_that_do_not_go_with_the_example_are_refused(columns: Any, example: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        feeds_of(columns, example)


def test_outputs_get_their_names() -> None:
    one, two = torch.ones(1, 2), torch.zeros(1, 3)
    assert list(name_outputs(one, "y")) == ["y"]
    assert list(name_outputs((one, two), "y")) == ["y_0", "y_1"]
    assert list(name_outputs((one, two), ("a", "b"))) == ["a", "b"]
    assert list(name_outputs({"logits": one, "cache": None}, "y")) == ["y_logits"]
    assert list(name_outputs({"logits": one, "cache": [two]}, ("logits",))) == ["logits"]
    with pytest.raises(UsageError, match="'y_cache' is list and no tensor"):
        name_outputs({"logits": one, "cache": [two]}, "y")
    with pytest.raises(UsageError, match="returns no 'scores', but logits"):
        name_outputs({"logits": one}, ("scores",))
    with pytest.raises(UsageError, match="bfloat16, which no column can hold"):
        columns_of([{"y": one.bfloat16()}])


def test_outputs_of_one_shape_of_several_and_of_none_come_back_from_the_table() -> None:
    outputs: list[dict[str, Any] | None] = [
        {"even": torch.tensor([[1.0, 2.0]]), "odd": torch.ones(1, 2, 2), "n": 3},
        None,
        {"even": torch.tensor([[3.0, 4.0]]), "odd": torch.zeros(1, 1, 2), "n": 4},
    ]
    table = with_columns(pa.table({"id": [1, 2, 3]}), columns_of(outputs))
    even, odd = values_of(table, "even"), values_of(table, "odd")
    assert even[1] is None and odd[1] is None and values_of(table, "n") == [3, None, 4]
    assert np.array_equal(even[2], [3.0, 4.0]) and even[0].dtype == np.float32
    assert np.array_equal(odd[0], np.ones((2, 2))) and odd[2].shape == (1, 2)


def test_tensors_cross_as_they_are_in_memory_of_their_own() -> None:
    sent = {"a": (torch.tensor(2.5), torch.ones(2, 3, dtype=torch.bfloat16).t()), "flag": True, "none": None}
    packed = pack(sent)
    packed["a"][1].data.flags.writeable = False  # as in the object store
    got = unpack(packed)
    assert torch.equal(got["a"][0], sent["a"][0]) and torch.equal(got["a"][1], sent["a"][1])
    got["a"][1].add_(1)
    assert got["flag"] is True and got["none"] is None
    assert nbytes(sent) == 4 + 12
