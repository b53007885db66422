"""The pipeline as its user sees it: a call, ``map``, what was predicted and measured, and what a lost node means."""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from narrowboat.cluster.pipeline.crew import Crew, Request
from narrowboat.cluster.pipeline.message import Message, pack, unpack
from narrowboat.cluster.pipeline.nodes import hosts, join
from narrowboat.errors import ClusterError, MapError, NodeLostError, PlacementError, SessionClosedError, UsageError
from narrowboat.plan.pipeline import OBJECTIVES, StageTime, flow
from narrowboat.profile.order import split_example

log = logging.getLogger("narrowboat")
ON_LOSS = ("raise", "replace")
MOST_IN_FLIGHT = 16
_PATIENCE, _LEAST_PATIENCE = 20.0, 60.0  # times what was predicted; seconds


class Pipeline:
    """A model split over the nodes of a Ray cluster; a context manager.

    The pass is recorded once for inputs of the example's shapes. Each node streams its own part of the weights within
    its own bytes, and never reads those of the others; activations go from node to node. The answers are plain
    PyTorch's bits, computed with as many threads per operator on processors alike.

    Args:
        factory: makes the module (in ``eval`` mode) without arguments; importable or picklable on every node.
        weights: path of the weights on every node, or ``{node: path}``.
        example: inputs of one pass: a tuple of positional or a dict of keyword arguments. Tensors may have other
            values in later calls, no other shapes or dtypes; what is no tensor stays as it is.
        budget: bytes of each stage, or ``{node: bytes}``; None for what a node offers as ``narrowboat_memory``.
        nodes: names or identities of those that may be used; None for all that offer memory.
        objective: ``"throughput"`` of many inputs, or ``"latency"`` of one: what the cuts are to make good.
        stages: how many; None for as many as are best.
        in_flight: most inputs on their way at once, up to 16; what waits counts against the budgets. None: twice as
            many as there can be stages.
        on_loss: when a node dies: ``"raise"`` a NodeLostError to who waits, or ``"replace"``: split anew over the
            nodes that are left, and run what was on its way again.
        threads: of every operator, on every node; None for this process's. The bits depend on it.
        timeout: seconds for the output of one input; None for 20 times what is predicted, a minute at least.
        no_split_module_classes: class names of modules that are not looked into for places to cut.

    Attributes:
        timeout: as given; may be changed between calls.
        replaced: times that the model was split anew after a loss.

    Raises:
        NoClusterError: Ray is not installed, no cluster is running, or no node offers memory.
        PlacementError: no split fits; names each node, the layer, and the smallest budget that would do.
        NodeVersionError: a node has other versions, or other code of the model.
        WeightsError: the weights are missing on a node, are not this model's, or differ between nodes.
        ModelError: the model cannot be built or parted, and why.
        NodeLostError: a node died or said nothing while it was asked.
        UsageError: an argument cannot be used as given.
    """

    def __init__(
        self,
        factory: Callable[[], nn.Module],
        weights: str | Path | Mapping[str, str | Path],
        *,
        example: Any,
        budget: int | str | Mapping[str, int | str] | None = None,
        nodes: Sequence[str] | None = None,
        objective: str = "throughput",
        stages: int | None = None,
        in_flight: int | None = None,
        on_loss: str = "raise",
        threads: int | None = None,
        timeout: float | None = None,
        no_split_module_classes: Collection[str] = (),
    ) -> None:
        if objective not in OBJECTIVES:
            raise UsageError(f"objective must be one of {', '.join(OBJECTIVES)}, not {objective!r}")
        if on_loss not in ON_LOSS:
            raise UsageError(f"on_loss must be one of {', '.join(ON_LOSS)}, not {on_loss!r}")
        if in_flight is not None and not 1 <= in_flight <= MOST_IN_FLIGHT:
            raise UsageError(f"in_flight must be from 1 to {MOST_IN_FLIGHT}, not {in_flight}")
        paths = {k: str(p) for k, p in weights.items()} if isinstance(weights, Mapping) else {"": str(weights)}
        self._flat, self._tree = tree_flatten(split_example(example))
        self._request = Request(
            factory,
            paths,
            example,
            tuple(no_split_module_classes),
            threads or torch.get_num_threads(),
            objective,
            stages,
            in_flight,
        )
        self._nodes, self._budget, self._on_loss = nodes, budget, on_loss
        self.timeout = timeout
        self._lost: set[str] = set()
        self._broken: ClusterError | None = None
        self._closed = False
        self._number = 0
        self._latencies: deque[float] = deque(maxlen=256)
        self._periods: deque[float] = deque(maxlen=64)
        self.replaced = 0
        join()
        self._crew = Crew(self._request, hosts(nodes, budget))

    # -- running it --------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for one input.

        Raises:
            UsageError: the input has not the example's form.
            NodeLostError: a node died on the way (and ``on_loss`` is "raise", or no node was left that could).
            ClusterError: nothing came in time.
            SessionClosedError: the pipeline is closed.
        """
        start = time.perf_counter()
        for value in self._run(iter([self._tensors(args, kwargs)])):
            self._latencies.append(time.perf_counter() - start)
            return self._opened(value)
        raise ClusterError("the pipeline made no output")  # not reached: an input has one

    def map(self, inputs: Iterable[Any]) -> Iterator[Any]:
        """Yield the output of each input, in order; several are on their way at once, one in each stage and more.

        Args:
            inputs: each a tuple of positional or a dict of keyword arguments, or a tensor. Pulled as there is room.

        Raises:
            MapError: an input failed, with its index and its cause; those before it were yielded.
        """
        given = ((item,) if isinstance(item, torch.Tensor) else item for item in inputs)
        ready = (self._tensors(*split_example(item)) for item in given)
        times: list[float] = []
        for index, value in enumerate(self._run(ready)):
            try:
                opened = self._opened(value)
            except Exception as error:
                raise MapError(f"input {index} failed: {type(error).__name__}: {error}", index=index) from error
            times.append(time.perf_counter())
            yield opened
        if len(times) > 3:  # the first is the way through; then they follow one another
            half = len(times) // 2
            self._periods.append((times[-1] - times[half - 1]) / (len(times) - half))

    def _run(self, given: Iterator[list[torch.Tensor]]) -> Iterator[Any]:
        """What the last stage tells of each input, in order, or the error of its pass."""
        waiting: deque[tuple[int, list[torch.Tensor]]] = deque()
        more = True
        try:
            while True:
                self._check_open()
                while more and len(waiting) < self._crew.split.in_flight:
                    tensors = next(given, None)
                    if tensors is None:
                        more = False
                        break
                    waiting.append((self._send(tensors), tensors))
                if not waiting:
                    return
                try:
                    value = self._crew.fetch(waiting[0][0], self.patience)
                except NodeLostError as error:
                    again = self._replace(error)
                    waiting = deque((again(tensors), tensors) for _, tensors in waiting)
                    continue
                except ClusterError as error:
                    self._break(error)
                    raise
                except Exception as error:  # of this input: the next ones go on
                    value = error
                waiting.popleft()
                yield value
        finally:
            # Outputs that nobody waits for any more are taken out of the way of the next call.
            if waiting and self._broken is None and not self._closed:
                self._discard([number for number, _ in waiting])

    def _discard(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            try:
                self._crew.fetch(number, self.patience)
            except ClusterError as error:
                self._break(error)
                return
            except Exception as error:
                log.debug("an input that nobody waits for failed: %s", error)

    def _send(self, tensors: list[torch.Tensor]) -> int:
        number, self._number = self._number, self._number + 1
        self._crew.send(number, pack(dict(enumerate(tensors))))
        return number

    def _opened(self, value: Any) -> Any:
        if isinstance(value, Exception):
            raise value
        message, values, tree = value
        assert isinstance(message, Message)
        values = list(values)
        for at, tensor in unpack(message).items():
            values[at] = tensor
        return tree_unflatten(values, tree)

    def _tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The tensors of an input, which has the example's form."""
        flat, tree = tree_flatten((args, kwargs))
        if tree != self._tree:
            raise UsageError(
                f"the pipeline was recorded for inputs of the form {self._tree}, and was given {tree}: "
                "make another one for inputs of another form"
            )
        tensors = []
        for value, known in zip(flat, self._flat, strict=True):
            if isinstance(known, torch.Tensor) != isinstance(value, torch.Tensor):
                raise UsageError(
                    f"an input is a {type(value).__name__}, where the example has a {type(known).__name__}"
                )
            if not isinstance(value, torch.Tensor):
                if value != known:
                    raise UsageError(f"an input is {value!r}, and the pipeline was recorded with {known!r}")
                continue
            if (value.shape, value.dtype) != (known.shape, known.dtype):
                raise UsageError(
                    f"an input is {list(value.shape)} of {value.dtype}, and the pipeline was recorded for "
                    f"{list(known.shape)} of {known.dtype}: make another one for other shapes"
                )
            tensors.append(value.detach())
        return tensors

    # -- losses ------------------------------------------------------------------------------------

    def _replace(self, error: NodeLostError) -> Callable[[list[torch.Tensor]], int]:
        """After a loss: a new crew on the nodes that are left, or the error. Returns what sends an input to it."""
        if self._on_loss == "raise":
            self._break(error)
            raise error
        log.warning("%s; the model is split anew over the nodes that are left", error)
        self._lost |= self._crew.lost()
        self._crew.close()
        try:
            self._crew = Crew(self._request, hosts(self._nodes, self._budget, self._lost))
        except ClusterError as why:
            lost = NodeLostError(f"{error}; and it cannot be replaced: {why}")
            self._break(lost)
            raise lost from (why if isinstance(why, PlacementError) else error)
        self._number = 0
        self.replaced += 1
        return self._send

    def _break(self, error: ClusterError) -> None:
        """Nothing can be run any more: memory goes back to the nodes that are left."""
        self._broken = error
        self._crew.close()

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosedError("the pipeline is closed; make another one")
        if self._broken is not None:
            raise NodeLostError(f"the pipeline ended when {self._broken}; make another one") from self._broken

    # -- what it tells -----------------------------------------------------------------------------

    @property
    def patience(self) -> float:
        """Seconds that the output of one input is waited for."""
        if self.timeout is not None:
            return self.timeout
        split = self._crew.split
        return max(_PATIENCE * split.flow().latency * split.in_flight, _LEAST_PATIENCE)

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes in use, in the order of the stages."""
        return [stage.node for stage in self._crew.split.stages]

    @property
    def identities(self) -> list[str]:
        """Ray's identities of the nodes in use, in the order of the stages."""
        return [self._crew.hosts[name].identity for name in self.nodes]

    def stats(self) -> dict[str, Any]:
        """What was predicted, and what was measured.

        ========================== ======= ===========================================================
        key                        unit    meaning
        ========================== ======= ===========================================================
        stages                     list    by stage: ``node``, ``pieces`` (layers that its pieces begin with), bytes
                                           (``budget_bytes``, ``weight_bytes``, ``resident_bytes``, ``peak_bytes``,
                                           ``bytes_read`` by pass, ``bytes_read_in_all``), milliseconds of a pass:
                                           ``predicted_first_ms`` (after a rest), ``predicted_steady_ms`` (back to
                                           back), ``measured_ms`` (median)
        hops                       list    by link: ``sender``, ``receiver`` ("" is the caller), ``bytes`` of an
                                           input, ``latency_ms``, ``bandwidth_bytes_per_s`` as measured
        planned_latency_ms         ms      of one input, when the cuts were chosen
        planned_period_ms          ms      between two outputs of many, when the cuts were chosen
        predicted_latency_ms       ms      the same from the plans in force on the nodes,
        predicted_period_ms        ms      which rest on measured passes once there were some
        measured_latency_ms        ms      of single calls, median of all but the first two; None without
        measured_period_ms         ms      of the last ``map``, second half; None without
        in_flight                  count   most inputs on their way at once
        replaced                   count   times that the model was split anew after a loss
        ========================== ======= ===========================================================

        Raises:
            NodeLostError: a node died, or does not answer.
            SessionClosedError: the pipeline is closed.
        """
        self._check_open()
        split, links = self._crew.split, self._crew.links
        stages = self._crew.stats()
        times = [StageTime(s["predicted_first_ms"] / 1e3, s["predicted_steady_ms"] / 1e3) for s in stages]
        now, planned = flow(times, split.hops, 1, split.in_flight), split.flow()
        names = ["", *self.nodes, ""]
        cuts = [0, *(stage.end for stage in split.stages)]
        ends = list(zip(names, names[1:], cuts, strict=False))
        settled = list(self._latencies)[min(2, max(len(self._latencies) - 1, 0)) :]
        return {
            "stages": stages,
            "hops": [
                {
                    "sender": sender,
                    "receiver": receiver,
                    "bytes": self._crew.chain.crossing(at),
                    "latency_ms": links[sender, receiver].latency * 1e3,
                    "bandwidth_bytes_per_s": links[sender, receiver].bandwidth,
                }
                for sender, receiver, at in ends
            ],
            "planned_latency_ms": planned.latency * 1e3,
            "planned_period_ms": planned.period * 1e3,
            "predicted_latency_ms": now.latency * 1e3,
            "predicted_period_ms": now.period * 1e3,
            "measured_latency_ms": statistics.median(settled) * 1e3 if settled else None,
            "measured_period_ms": self._periods[-1] * 1e3 if self._periods else None,
            "in_flight": split.in_flight,
            "replaced": self.replaced,
        }

    def close(self) -> None:
        """Give everything back on every node; idempotent, and never waits long for one that does not answer."""
        if not self._closed:
            self._closed = True
            self._crew.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
