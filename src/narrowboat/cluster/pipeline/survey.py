"""What a node finds out about the model before it is cut: where it can be, and what each piece costs there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from narrowboat.arena.slot import Weight
from narrowboat.checkpoint import WeightsIndex, open_index
from narrowboat.checkpoint.files import opened, read_exactly
from narrowboat.cluster.pipeline.part import Part
from narrowboat.cluster.pipeline.program import Program
from narrowboat.cluster.pipeline.record import record
from narrowboat.errors import ModelError
from narrowboat.machine.malloc import MallocPolicy
from narrowboat.machine.storage_choice import load_storage_choice
from narrowboat.plan.model import Workload
from narrowboat.plan.pipeline import Chain, Piece
from narrowboat.profile.measure import estimate_steps
from narrowboat.profile.memory import activation_parts
from narrowboat.profile.order import split_example
from narrowboat.profile.skeleton import build_skeleton, fixed_buffer_bytes, match_weights
from narrowboat.profile.use_trace import ENTER, TraceError, UseTrace, announces, trace_uses
from narrowboat.profile.workload import form_groups

MOST_PIECES = 32
_PER_WEIGHT = 6 << 10  # bytes of Python and tensor objects, as a session counts them
_FLOPS, _TRAFFIC = 5e10, 1e10  # per second, of any core of these years: what pieces are made even by
_SAMPLE = 4096  # bytes of each tensor that are compared where a file carries no digests


@dataclass
class Model:
    """The model as one node knows it.

    Attributes:
        skeleton: without weights.
        program: its pass.
        identity: the program's digest.
        index: the weights on this node.
        chain: what the pieces cost, computing times estimated.
        cuts: the instruction at which each piece begins, and the end.
        tensors: of the example's inputs.
    """

    skeleton: nn.Module
    program: Program
    identity: str
    index: WeightsIndex
    chain: Chain
    cuts: list[int]
    tensors: list[torch.Tensor]

    def part(self, begin: int, end: int) -> Part:
        """The pieces ``[begin, end)`` as a module."""
        return Part(self.program, self.skeleton, self.cuts[begin], self.cuts[end], self.identity)

    @property
    def staging(self) -> int:
        """Bytes that reading a file that is not packed takes beside the weights."""
        return 0 if self.index.packed else load_storage_choice(self.index.files[0]).for_copies().staging_bytes


def study(factory: Callable[[], nn.Module], weights: str, example: Any, no_split: Collection[str] = ()) -> Model:
    """Record the pass, open the weights, and see what each piece takes; no weight is read.

    Raises:
        ModelError: the model cannot be built or parted.
        WeightsError: the weights are missing, malformed, or not this model's.
    """
    args, kwargs = split_example(example)
    index = open_index(weights)
    index.require_streamable()
    skeleton = build_skeleton(factory)
    match_weights(skeleton, index)
    program = record(skeleton, args, kwargs, no_split=no_split)
    tensors = program.tensors_of(args, kwargs)
    identity = program.digest()
    whole = Part(program, skeleton, 0, len(program.instructions), identity)
    matched = match_weights(whole, index, strict=False)
    try:
        trace = trace_uses(whole, matched.numbers, tuple(tensors), {})
    except TraceError as error:
        raise ModelError(f"{type(skeleton).__name__} cannot be traced piece by piece: {error}") from error
    places = _places(program, whole, trace)
    seconds = estimate_steps(trace)
    cuts = _pieces(program, places, trace, matched.weights)
    pieces = []
    for (at, first), (until, last) in zip(
        cuts, [*cuts[1:], (len(program.instructions), len(trace.uses))], strict=True
    ):
        part = Part(program, skeleton, at, until, identity)
        pieces.append(
            _piece(part, sliced(trace, first, last), seconds[first:last], matched.weights, program, index.packed)
        )
    chain = Chain(tuple(pieces), program.bytes_of(program.crossing(0)))
    return Model(
        skeleton, program, identity, index, chain, [*(at for at, _ in cuts), len(program.instructions)], tensors
    )


def weights_identity(index: WeightsIndex) -> str:
    """What tells weights from others on another node: the digest of a packed file, else headers and samples.

    Of a file that is not packed, the first 4 KiB of every tensor are compared.
    """
    if index.packed:
        return index.digest
    told = hashlib.sha256()
    for path in index.files:
        with opened(path) as (descriptor, _):
            for entry in index.entries.values():
                if entry.file == path:
                    told.update(f"{entry.name} {entry.dtype} {entry.shape} {entry.offset};".encode())
                    told.update(read_exactly(descriptor, path, entry.offset, min(entry.nbytes, _SAMPLE)))
    return told.hexdigest()


def _places(program: Program, whole: Part, trace: UseTrace) -> list[tuple[int, int]]:
    """Where the pass can be cut: ``(instruction, step)`` of each call of a module with weights."""
    calls = [
        at
        for at, instruction in enumerate(program.instructions)
        if instruction.is_module and announces(whole.get_submodule(instruction.target))
    ]
    depth, steps = 0, []
    for step, (_, kind) in enumerate(trace.events):
        if kind == ENTER and depth == 1:
            steps.append(step)
        depth += 1 if kind == ENTER else -1
    if len(steps) != len(calls):
        raise ModelError(
            f"a pass of {len(calls)} calls was traced as {len(steps)}: the model is not the same in every pass"
        )
    return list(zip(calls, steps, strict=True))


def _pieces(
    program: Program,
    places: list[tuple[int, int]],
    trace: UseTrace,
    weights: list[Weight],
) -> list[tuple[int, int]]:
    """The cuts offered to the planner: about ``MOST_PIECES`` even pieces, cut where little crosses.

    They have to be the same on every node, so nothing that was measured decides about them.
    """
    seconds = [max(f / _FLOPS, t / _TRAFFIC) for f, t in zip(trace.flops, trace.traffic, strict=True)]
    nbytes = [sum(weights[w].entry.nbytes for w in used) for used in trace.uses]
    total_bytes, total_seconds = sum(nbytes) or 1, sum(seconds) or 1.0
    share = [b / total_bytes / 2 + s / total_seconds / 2 for b, s in zip(nbytes, seconds, strict=True)]
    chosen, at = [(0, 0)], 1
    least = 1 / MOST_PIECES
    while at < len(places):
        begin, taken, options = chosen[-1][1], 0.0, []
        step = begin
        while at < len(places) and taken < 2 * least:
            taken += sum(share[step : places[at][1]])
            step = places[at][1]
            if taken >= least:
                options.append(at)
            at += 1
        if not options:
            break
        best = min(options, key=lambda i: program.bytes_of(program.crossing(places[i][0])))
        chosen.append(places[best])
        at = best + 1
    return chosen


def sliced(trace: UseTrace, first: int, last: int) -> UseTrace:
    """The steps ``[first, last)`` of a trace, as a trace."""
    part = UseTrace(
        **{
            name: getattr(trace, name)[first:last]
            for name in (
                *("events", "uses", "flops", "traffic", "peaks", "largest", "looked_up", "workspaces"),
                *("columns", "fresh", "rows", "alive"),
            )
        },
        holds=[
            (w, max(a, first) - first, min(b, last - 1) - first) for w, a, b in trace.holds if b >= first and a < last
        ],
        whole=set(trace.whole),
        written=set(trace.written),
    )
    part.activation_bytes = max([*part.peaks, *part.alive], default=0)
    return part


def _piece(
    part: Part, trace: UseTrace, seconds: tuple[float, ...], weights: list[Weight], program: Program, packed: bool
) -> Piece:
    # Only the weights of these steps: the others would come as blocks that are never used.
    used = {w for step in trace.uses for w in step}
    groups = [g for g in form_groups(trace, weights, packed=packed) if used.intersection(g.weights)]
    fixed = sum(activation_parts(trace, MallocPolicy.STRICT).values())
    work = Workload(tuple(group.block for group in groups), tuple(seconds), fixed)
    name = next(iter(program.modules(part.begin, part.end)), "the end")
    kept = fixed_buffer_bytes(part) + _PER_WEIGHT * len(used)
    return Piece(name, work, kept, program.bytes_of(program.crossing(part.end)))
