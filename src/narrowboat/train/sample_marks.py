"""What samples of a batch can differ in without differing in shape: padding, masks, lengths, weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from narrowboat.train.micro_batch import batch_size, has_rows, tensors_in

_AT_ONCE = 1 << 20  # entries looked at together


def marks(inputs: Any, targets: Any) -> Tensor:
    """Numbers that tell samples apart, ``[samples, features]`` in float64, telling features first.

    For every tensor with a row per sample: how many zeros (among integers: and negative ones) and how many NaNs the
    row has, as padding, ignored targets and masks look like that; its value where it has just one (a length, a
    weight); and the sum of its entries.
    """
    size = batch_size(inputs, targets)
    counts: list[Tensor] = []
    values: list[Tensor] = []
    sums: list[Tensor] = []
    for tensor in tensors_in((inputs, targets)):
        if not has_rows(tensor, size) or tensor.is_complex() or not tensor.numel():
            continue
        rows = tensor.detach().reshape(size, -1)
        zeros, nans, totals = torch.cat(
            [_of(some) for some in rows.split(max(1, _AT_ONCE // rows.shape[1]))], dim=1
        ).unbind()
        counts += [zeros, nans]
        (values if rows.shape[1] == 1 else sums).append(totals)
    return torch.stack([torch.zeros(size, dtype=torch.float64), *counts, *values, *sums], dim=1)


def differing(found: Tensor) -> Tensor:
    """Which features are not the same for all samples, as booleans."""
    return (found != found[:1]).any(dim=0)


def spread(found: Tensor, samples: int, first: Sequence[int] = ()) -> list[int]:
    """Samples that differ as much as there are differences, those of small numbers before those of large ones.

    Args:
        found: what ``marks`` gives.
        samples: how many; all if there are fewer.
        first: features that matter most.
    """
    features = list(dict.fromkeys([*first, *differing(found).nonzero().flatten().tolist()])) or [0]
    orders = [found[:, feature].argsort(stable=True).tolist() for feature in features]
    chosen: dict[int, None] = {}
    for place in range(len(found)):
        for order in orders:
            chosen |= dict.fromkeys((order[place], order[-1 - place]))
    rank = {sample: place for place, sample in enumerate(orders[0])}
    return sorted(list(chosen)[:samples], key=rank.__getitem__)


def _of(rows: Tensor) -> Tensor:
    if rows.is_floating_point():
        nothing, nans, values = rows == 0, rows.isnan().sum(dim=1), rows.nan_to_num()
    else:
        nothing, nans, values = rows <= 0, torch.zeros(len(rows), device=rows.device), rows
    return torch.stack([nothing.sum(dim=1).double(), nans.double(), values.sum(dim=1, dtype=torch.float64)]).cpu()
