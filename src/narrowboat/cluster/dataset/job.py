"""What everybody who works at one mapped data set has to know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from narrowboat.cluster.dataset.rows import Rows


@dataclass(frozen=True)
class Model:
    """The model, as each node builds it.

    Attributes:
        factory: takes no arguments; found on every node.
        weights: path of the weights file, the same on every node.
        example: inputs of one pass (see ``nb.stream``).
        strict, verify: see ``nb.stream``.
        inputs_per_sweep: inputs that share one reading of the weights; None: the session decides.
        threads: of PyTorch, in each worker.
    """

    factory: Callable[[], Any]
    weights: str
    example: tuple[Any, ...] | Mapping[str, Any]
    strict: bool = True
    verify: str = "off"
    inputs_per_sweep: int | None = None
    threads: int = 1


@dataclass(frozen=True)
class Terms:
    """What a node has to agree with before it works.

    Attributes:
        versions: of what decides about bits (``cluster.facts.versions``).
        weights: identity of the weights (``survey.identity``).
        instructions: the instruction set that PyTorch's kernels are chosen by; "" for any.
    """

    versions: Mapping[str, str]
    weights: str
    instructions: str = ""


@dataclass(frozen=True)
class Job:
    """One mapped data set.

    Attributes:
        name: unlike that of any other.
        model: pickled ``Model``: a node that cannot read it can say so.
        terms: what a node has to agree with.
        rows: how rows become inputs, and outputs columns.
        budget: bytes on each node; None: all that it offers.
        nodes: identities of the nodes that were found fit.
        refused: identities of those that were not; a node in neither joined later, and may help if ``open``.
        open: whether nodes may join.
        keeper: handle of the actor that owns the workers, and gathers what they tell.
        patience: seconds without any node after which the job is given up.
    """

    name: str
    model: bytes
    terms: Terms
    rows: Rows
    budget: int | None
    nodes: tuple[str, ...]
    refused: frozenset[str] = frozenset()
    open: bool = True
    keeper: Any = field(default=None, compare=False)
    patience: float = 60.0
