"""What a node is asked before it works at a data set: who it is, whether it has the weights, whether they fit."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from narrowboat.checkpoint import WeightsIndex, open_index
from narrowboat.cluster.dataset.job import Model, Terms
from narrowboat.cluster.facts import differing, sample, versions
from narrowboat.errors import NodeVersionError
from narrowboat.plan.model import Machine
from narrowboat.profile.order import split_example
from narrowboat.quantities import format_bytes
from narrowboat.stream.prepare import prepare
from narrowboat.stream.tiling import fit

_BANDWIDTH = 1e9  # bytes per second: whether a plan fits does not depend on it


@dataclass(frozen=True)
class Found:
    """What a node says of itself.

    Attributes:
        versions: of what decides about bits.
        instructions: the instruction set that PyTorch's kernels are chosen by.
        weights: identity of its weights; "" if they cannot be read.
        minimum: bytes of the smallest budget with which the model runs there; 0 if that is not known.
        refusal: why it cannot work; "" if it can.
    """

    versions: Mapping[str, str]
    instructions: str
    weights: str = ""
    minimum: int = 0
    refusal: str = ""


def survey(model: bytes, budget: int) -> Found:
    """Look, on the node itself. Nothing is read of the weights but headers, and samples of files that are not packed.

    Args:
        model: pickled ``Model``.
        budget: bytes that a worker would have there.
    """
    here, instructions = versions(), torch.backends.cpu.get_cpu_capability()
    weights, minimum, threads = "", 0, torch.get_num_threads()
    try:
        told = unpickle(model)
        index = open_index(told.weights)
        weights = identity(index)
        pair = split_example(told.example)
        torch.set_num_threads(told.threads)  # whose memory counts
        fitted = fit(prepare(told.factory, index, pair, strict=told.strict), budget, whole_stacks=told.verify != "off")
        minimum = (fitted.least or fitted.check(budget))[0]
        if told.inputs_per_sweep is not None and not fitted.holds_all(budget):
            fitted.decide(Machine(bandwidth=_BANDWIDTH), budget, told.inputs_per_sweep)
    except Exception as error:  # whatever it is, it is this node's reason; the others may do
        minimum = int(getattr(error, "minimum", 0) or 0)
        return Found(here, instructions, weights, minimum, reason(error, budget))
    finally:
        torch.set_num_threads(threads)
    return Found(here, instructions, weights, minimum)


def reason(error: Exception, budget: int) -> str:
    """In words, for people who do not see the node."""
    minimum = getattr(error, "minimum", None)
    if minimum:
        limiter = getattr(error, "limiter", "")
        return f"the model needs {format_bytes(minimum)} and would have {format_bytes(budget)}" + (
            f" ({limiter})" if limiter else ""
        )
    if isinstance(error, ImportError):
        return f"the model's factory cannot be imported there: {error}"
    return f"{type(error).__name__}: {error}"


def unpickle(model: bytes) -> Model:
    """The model again. Raises whatever its factory's module raises."""
    told = pickle.loads(model)
    assert isinstance(told, Model)
    return told


def check_terms(terms: Terms, weights: str) -> None:
    """A node that is to work has what was agreed.

    Raises:
        NodeVersionError: versions, instruction set or weights are others.
    """
    other = differing(dict(terms.versions), versions())
    if other:
        raise NodeVersionError(f"other versions: {other}")
    instructions = torch.backends.cpu.get_cpu_capability()
    if terms.instructions and instructions != terms.instructions:
        raise NodeVersionError(f"its processor has {instructions}, where the others have {terms.instructions}")
    if identity(open_index(weights)) != terms.weights:
        raise NodeVersionError(f"the weights at {weights} are not those of the other nodes")


def identity(index: WeightsIndex) -> str:
    """What tells weights from others: exact for packed files, whose headers hold digests of all they contain.

    For others it is the names, types and shapes of the tensors, the sizes of the files, and samples of them.
    """
    if index.packed:
        return index.digest
    digest = hashlib.sha256()
    for name in sorted(index.entries):
        entry = index.entries[name]
        digest.update(f"{name}:{entry.dtype}:{tuple(entry.shape)};".encode())
    for path in index.files:
        sample(path, digest.update)
    return digest.hexdigest()


def survey_remotely() -> Any:
    """``survey`` as a Ray task that takes none of the node's accounts."""
    import ray

    return ray.remote(num_cpus=0, max_retries=0)(survey)
