"""The same bits, whatever structure they come in."""

from __future__ import annotations

import dataclasses

import torch

from narrowboat.report.exact import first_difference, output_digest, output_tensors


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]
    loss: float | None = None


class Cache:
    def __init__(self) -> None:
        self.keys = [torch.zeros(2)]
        self.owner = self


def test_tensors_are_found_in_containers_dataclasses_and_objects() -> None:
    output = {"a": torch.ones(1), "b": Output(torch.ones(2), (torch.ones(3),)), "c": [Cache()], "d": "text"}
    assert [tensor.numel() for tensor in output_tensors(output)] == [1, 2, 3, 2]


def test_nan_equals_the_same_nan_and_minus_zero_is_not_zero() -> None:
    nan = [torch.tensor([float("nan"), 1.0])]
    assert first_difference(nan, [nan[0].clone()]) == ""
    assert "sign of a zero" in first_difference([torch.tensor([0.0])], [torch.tensor([-0.0])])


def test_a_difference_is_counted_and_measured() -> None:
    words = first_difference([torch.tensor([1.0, 2.0, 3.0])], [torch.tensor([1.0, 2.5, 3.0])])
    assert words == "1 of 3 elements of output 0 differ, by 0.5 at most"


def test_number_shape_and_dtype_count() -> None:
    one = torch.zeros(2, dtype=torch.bfloat16)
    assert "1 output tensors instead of 2" in first_difference([one], [one, one])
    assert "instead of torch.float32" in first_difference([one], [one.float()])
    assert output_digest(one) != output_digest(one.view(1, 2))


def test_a_digest_depends_on_every_bit_and_not_on_strides() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    assert output_digest([tensor]) == output_digest((tensor.t().contiguous().t(),))
    other = tensor.clone()
    other.view(torch.int32)[1, 2] ^= 1
    assert output_digest(tensor) != output_digest(other)
