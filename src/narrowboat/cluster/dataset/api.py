"""``map_dataset``: a data set larger than memory through a model larger than memory, on many nodes."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from narrowboat.cluster.dataset.job import Job, Model
from narrowboat.cluster.dataset.nodes import agree, chosen, look, refuse_if_none, require_cluster
from narrowboat.cluster.dataset.rows import MISSING, Rows, feeds_of
from narrowboat.cluster.dataset.stats import MapStats
from narrowboat.cluster.dataset.wire import nbytes
from narrowboat.cluster.machines import living_machines
from narrowboat.errors import UsageError
from narrowboat.quantities import parse_bytes
from narrowboat.stream.map import MOST_ASKED

if TYPE_CHECKING:
    from ray.data import Dataset

_BATCH_ROWS = 256
_BATCH_BYTES = 64 << 20
_CALLS = 2  # batches that a sender works at: while one is in the model, the next is made ready


def map_dataset(
    dataset: Dataset,
    factory: Callable[[], nn.Module],
    weights: str | Path,
    *,
    budget: int | str | None,
    example: tuple[Any, ...] | Mapping[str, Any],
    columns: str | Sequence[str] | Mapping[str, str] | None = None,
    output: str | Sequence[str] = "output",
    prepare: Callable[[dict[str, Any]], Any] | None = None,
    finish: Callable[[Any], Mapping[str, Any]] | None = None,
    keep: Sequence[str] | None = None,
    missing: str = "raise",
    inputs_per_sweep: int | None = None,
    nodes: int | Sequence[str] | None = None,
    ordered: bool = False,
    strict: bool = True,
    verify: str = "off",
    threads: int | None = None,
    same_bits: bool = True,
    patience: float = 60.0,
    stats: MapStats | None = None,
) -> Dataset:
    """A data set with the model's outputs as further columns; lazy: the model runs when it is read.

    On each node that takes part one worker holds one session within its budget, and takes several inputs through each
    block while it is in memory (``Session.map``). The budget is booked as the Ray resource ``narrowboat_memory``; a
    node with more than that gets no second worker, which would read the weights a second time through the same
    storage: give it more with ``budget=None``. Every row is a pass of its own, with the bits of a call. Each row
    comes out once, also where a node dies and its batches are done again elsewhere. Rows come in no order unless
    ``ordered``; the columns that are carried over tell them apart.

    Args:
        dataset: of Ray Data.
        factory: makes the model, taking no arguments; importable on the nodes, or picklable.
        weights: the weights file or folder, by the same path on every node.
        budget: bytes of each worker over its process's baseline, as for ``nb.stream``; None: all that a node offers.
        example: the arguments of one pass, a tuple or a dict; only shapes and types are used, and what is no tensor is
            passed on in every call.
        columns: what feeds the model: a column, several for as many positional arguments, or a dict from keyword
            argument to column. A row with one dimension fewer than the example gets a leading one, which its output
            loses again. With ``prepare``: the columns that it is given, by default all.
        output: column of the output. Of a tuple of outputs: one name for each; of a dict: the keys that are wanted. A
            single name is put before numbers or keys.
        prepare: from a row (a dict) to the arguments of one call (a tensor, a tuple or a dict), such as decoding and
            scaling an image. It runs outside of the budget.
        finish: from what the model returned to a dict of columns, outside of the budget.
        keep: columns that are carried over; None: all but ``columns``.
        missing: what becomes of a row with None in one of ``columns``: "raise", or "null" for outputs of None.
        inputs_per_sweep: inputs that share a reading of the weights, 1 to 64; None: each session decides, by its plan.
        nodes: at most so many of them, or their names or identities; None: all that can, and those that join later.
        ordered: rows come in the order in which they went in; finished ones are held back for it.
        strict, verify: as for ``nb.stream``.
        threads: of PyTorch in a worker; None: as many as here, whose bits are then had everywhere.
        same_bits: refuse nodes whose processors would choose other kernels.
        patience: seconds without any node that can work after which reading fails with ``NodeLostError``.
        stats: gathers what the nodes do.

    Raises:
        NoClusterError: Ray is not installed, not connected, or no node offers memory.
        PlacementError: no node can run the model within the budget; with each node's reason.
        NodeVersionError: versions, weights or processors differ between nodes.
        UsageError: an argument cannot be used as given.

    While the data set is read, ``RowError`` (a ``MapError``) names a row that the model or ``prepare`` refused, and
    ``NodeLostError`` says that no node is left.
    """
    require_cluster()
    nbytes_ = None if budget is None else parse_bytes(budget, what="budget")
    _check(missing, inputs_per_sweep, threads, patience)
    rows = Rows(
        feeds=() if prepare is not None else feeds_of(columns, example),
        example=example,
        prepare=prepare,
        columns=_names(columns) if prepare is not None else None,
        keep=None if keep is None else tuple(keep),
        missing=missing,
        output=output if isinstance(output, str) else tuple(output),
        finish=finish,
    )
    model = _pickled(
        Model(
            factory, os.fspath(weights), example, strict, verify, inputs_per_sweep, threads or torch.get_num_threads()
        )
    )
    known = chosen(nodes, living_machines())
    names = {machine.identity: machine.name for machine in known}
    found, reasons = look(known, model, nbytes_)
    terms = agree(names, found, same_bits=same_bits)
    reasons |= {identity: one.refusal for identity, one in found.items() if one.refusal}
    usable = [machine for machine in known if machine.identity in found and not found[machine.identity].refusal]
    refuse_if_none(usable, names, reasons)
    if stats is not None:
        stats.left_out.update({names[identity]: why for identity, why in reasons.items()})
    usable = usable[:nodes] if isinstance(nodes, int) else usable
    job = Job(
        name=f"narrowboat-map-{uuid.uuid4().hex[:12]}",
        model=model,
        terms=terms,
        rows=rows,
        budget=nbytes_,
        nodes=tuple(machine.identity for machine in usable),
        refused=frozenset(reasons),
        open=nodes is None,
        keeper=(stats or MapStats()).begin(),
        patience=patience,
    )
    return _through(dataset, job, _batch_rows(example, inputs_per_sweep), ordered)


def _through(dataset: Dataset, job: Job, batch_rows: int, ordered: bool) -> Dataset:
    from ray.data import ActorPoolStrategy

    from narrowboat.cluster.dataset.sender import Sender

    made = dataset.map_batches(
        Sender,
        fn_constructor_args=(job,),
        batch_size=batch_rows,
        batch_format="pyarrow",
        num_cpus=0,  # a sender waits; what it books must not keep reading from being scheduled
        compute=ActorPoolStrategy(
            size=len(job.nodes),
            max_concurrent_calls_per_actor=_CALLS,
            max_tasks_in_flight_per_actor=_CALLS + 1,
            enable_true_multi_threading=True,
        ),
    )
    # So that a row's error arrives as what it is.
    made.context.raise_original_map_exception = True
    if ordered:
        made.context.execution_options.preserve_order = True
    return made


def _batch_rows(example: Any, inputs_per_sweep: int | None) -> int:
    """Rows that a sender takes at once: bounded in bytes, and whole sweeps."""
    rows = max(min(_BATCH_ROWS, _BATCH_BYTES // max(nbytes(example), 1)), 1)
    sweep = inputs_per_sweep or 1
    return max(rows // sweep, 1) * sweep


def _check(missing: str, inputs_per_sweep: int | None, threads: int | None, patience: float) -> None:
    if missing not in MISSING:
        raise UsageError(f"missing must be one of {', '.join(MISSING)}, not {missing!r}")
    for name, value, most in (("inputs_per_sweep", inputs_per_sweep, MOST_ASKED), ("threads", threads, 1024)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most):
            raise UsageError(f"{name} is a number from 1 to {most} or None, not {value!r}")
    if not patience > 0:
        raise UsageError(f"patience is a number of seconds above 0, not {patience!r}")


def _names(columns: str | Sequence[str] | Mapping[str, str] | None) -> tuple[str, ...] | None:
    if columns is None:
        return None
    if isinstance(columns, str):
        return (columns,)
    return tuple(columns.values() if isinstance(columns, Mapping) else columns)


def _pickled(model: Model) -> bytes:
    from ray import cloudpickle

    try:
        return bytes(cloudpickle.dumps(model))
    except Exception as error:
        raise UsageError(
            f"the factory or the example cannot be sent to the nodes ({type(error).__name__}: {error}): use a "
            "function of a module that is installed on them"
        ) from error
