"""The parameter-use trace: which weights each stretch of a pass really uses, and in which order.

A pass is cut at every entry to and exit from a module. What runs between two such events is a *step*. A weight
belongs to the steps in which an operator touches it, wherever the code that touches it stands: an output projection
used by its parent's forward, a tied head, an expert stack, a parameter read as data. Views count as the weight they
are taken from: a weight whose view made in step 3 is used in step 9 is held from 3 to 9.

The trace is taken on a deep copy of the skeleton with fake tensors (shapes without bytes), so neither the model's own
attributes nor its caches ever see one.
"""

from __future__ import annotations

import copy
import functools
import logging
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from narrowboat.profile.attention import can_unfuse, unfuse
from narrowboat.profile.convolution import workspace
from narrowboat.profile.rowwise import aten, takes_rows
from narrowboat.profile.skeleton import tensor_names

ENTER, EXIT = 0, 1
PIECES = (
    64 << 10,
    256 << 10,
    1 << 20,
)  # sizes from which on allocator policies give memory back
_COUNTS = ("peaks", "largest", "looked_up", "workspaces", "columns", "fresh", "rows")  # bytes and numbers, by step
Event = tuple[int, int]  # (module number, ENTER or EXIT)


@dataclass
class UseTrace:
    """One pass, cut into steps.

    Attributes:
        events: the event that opens each step: (module number in ``named_modules`` order, ENTER or EXIT).
        uses: for each step, the weight numbers it touches, in order of first touch.
        holds: ``(weight, first step, last step)`` where a view outlives the step it was made in.
        flops: floating-point operations of each step (0 where unknown).
        traffic: bytes read and written by the operators of each step.
        peaks: most bytes of intermediate tensors and workspaces alive at once in each step (0 where nothing is made).
        largest: bytes of the largest tensor made in each step.
        looked_up: indices that embedding operators are given in each step.
        workspaces: bytes of the scratch memory that a convolution takes in each step (``profile.convolution``).
        columns: of those, of its unfolded input; 0 where oneDNN computes.
        fresh: most bytes alive at once of what each step makes, where the heap keeps what is freed meanwhile.
        rows: rows (first spatial size) that convolutions make in each step.
        activation_bytes: most bytes of intermediate tensors and kernel workspaces alive at once, inputs included.
        taken: bytes allocated over the pass in pieces of at least the sizes ``PIECES``;
            what an allocator policy that gives memory back has to fault in again.
        written: weights that the pass modifies in place.
        output_bytes: bytes of the pass's results.
        alive: bytes of intermediate tensors alive as each step begins, inputs included; empty where unknown.
        cache_bytes: of the activations, the key-value cache that the pass hands back.
        whole: weights that an operator wants as a whole; of the others, all take single rows of the first dimension.
    """

    events: list[Event] = field(default_factory=list)
    uses: list[list[int]] = field(default_factory=list)
    holds: list[tuple[int, int, int]] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    traffic: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    largest: list[int] = field(default_factory=list)
    looked_up: list[int] = field(default_factory=list)
    workspaces: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    activation_bytes: int = 0
    taken: tuple[int, ...] = (0,) * len(PIECES)
    written: set[int] = field(default_factory=set)
    output_bytes: int = 0
    alive: list[int] = field(default_factory=list)
    cache_bytes: int = 0
    whole: set[int] = field(default_factory=set)

    def open_step(self, event: Event) -> None:
        """Begin the step that ``event`` opens."""
        self.events.append(event)
        self.uses.append([])
        self.flops.append(0.0)
        self.traffic.append(0.0)
        for name in _COUNTS:
            getattr(self, name).append(0)

    def repeat(self, trace: UseTrace, step: int) -> None:
        """Begin a step that is like ``step`` of another trace."""
        self.open_step(trace.events[step])
        self.uses[-1] = list(trace.uses[step])
        for name in ("flops", "traffic", *_COUNTS):
            getattr(self, name)[-1] = getattr(trace, name)[step]

    def use(self, weight: int) -> None:
        """Note that the current step touches ``weight``."""
        if self.uses and weight not in self.uses[-1]:
            self.uses[-1].append(weight)

    @property
    def kept_bytes(self) -> int:
        """The same as ``activation_bytes`` where nothing of what is freed within a step is used again in it."""
        return max([self.activation_bytes, *map(sum, zip(self.alive, self.fresh, strict=False))])

    def execution_order(self) -> list[int]:
        """Weight numbers in order of first use."""
        return list(dict.fromkeys(w for step in self.uses for w in step))


class TraceError(Exception):
    """Fake execution is not possible for this model; the first real pass is the trace then."""


class _Recorder(TorchDispatchMode):
    """Sees every operator of the fake pass."""

    def __init__(self, trace: UseTrace, weight_of_storage: dict[int, int], mode: FakeTensorMode) -> None:
        super().__init__()
        self.trace = trace
        self.weight_of = weight_of_storage
        self.mode = mode
        self.alive = 0
        self.peak = 0
        self.made = 0  # of those alive, in this step
        self.taken = [0] * len(PIECES)
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._made_in: dict[int, int] = {}  # id of a view of a weight -> step it was made in
        self._views: list[torch.Tensor] = []
        self._own: set[int] = set()
        self._rows: set[int] = set()  # ids of views of single rows

    def own(self, tensor: torch.Tensor) -> None:
        """``tensor`` is a weight itself, not a view of one."""
        self._own.add(id(tensor))

    def open_step(self, event: Event) -> None:
        """Begin a step of the trace, and note what is alive at that moment."""
        self.trace.open_step(event)
        self.trace.alive.append(self.alive)
        self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = _grouped_mm(*args, **kwargs) if func is _GROUPED_MM else func(*args, **kwargs)
        step = len(self.trace.uses) - 1
        inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        outputs = [t for t in tree_flatten(out)[0] if isinstance(t, torch.Tensor)]
        touched = False
        if step >= 0:
            for tensor in inputs:
                weight = self._weight(tensor)
                if weight is not None:
                    touched = True
                    self.trace.use(weight)
                    made = self._made_in.get(id(tensor), step)
                    if made < step:
                        self.trace.holds.append((weight, made, step))
                    if _is_written(func, tensor, args, kwargs):
                        self.trace.written.add(weight)
                    if id(tensor) not in self._rows and not takes_rows(func, args, tensor):
                        self.trace.whole.add(weight)
        for tensor in outputs:
            weight = self._weight(tensor)
            if weight is not None and id(tensor) not in self._own:
                self._made_in[id(tensor)] = step
                self._views.append(tensor)  # keeps the id unique
                if func is aten.select.int or any(id(t) in self._rows for t in inputs):
                    self._rows.add(id(tensor))
            elif weight is None:
                self._count(tensor)
        if step >= 0:
            self._cost(func, args, kwargs, inputs, outputs, out, step, touched)
        return out

    def _weight(self, tensor: torch.Tensor) -> int | None:
        try:
            return self.weight_of.get(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):
            return None

    def _count(self, tensor: torch.Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return
        if storage in self._known:
            return
        nbytes = storage.nbytes()
        self._known[storage] = nbytes
        self.alive += nbytes
        self.made += nbytes
        self._reach(self.alive)
        if self.trace.largest:
            self.trace.fresh[-1] = max(self.trace.fresh[-1], self.made)
            self.trace.largest[-1] = max(self.trace.largest[-1], nbytes)
        self._take(nbytes)
        weakref.finalize(storage, self._freed, nbytes, len(self.trace.events))

    def _reach(self, nbytes: int) -> None:
        self.peak = max(self.peak, nbytes)
        if self.trace.peaks:
            self.trace.peaks[-1] = max(self.trace.peaks[-1], nbytes)

    def _take(self, nbytes: int) -> None:
        for at, least in enumerate(PIECES):
            if nbytes >= least:
                self.taken[at] += nbytes

    def _freed(self, nbytes: int, step: int) -> None:
        self.alive -= nbytes
        self.made -= nbytes if step == len(self.trace.events) else 0

    def _cost(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        inputs: list[Any],
        outputs: list[Any],
        out: Any,
        step: int,
        weighty: bool,
    ) -> None:
        from torch.utils.flop_counter import flop_registry

        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.trace.flops[step] += float(formula(*args, **kwargs, out_val=out))
        moved = sum(_nbytes(t) for t in inputs) + sum(_nbytes(t) for t in outputs)
        if outputs and not getattr(func, "is_view", False):  # a question about a tensor moves none of its bytes
            self.trace.traffic[step] += moved
        if "embedding" in func._schema.name and len(inputs) > 1:
            self.trace.looked_up[step] += inputs[1].numel()
        if func is aten.convolution.default:
            scratch = workspace(*args, **kwargs, output=outputs[0])
            self._reach(self.alive + scratch.nbytes)
            self.trace.workspaces[step] = max(self.trace.workspaces[step], scratch.nbytes)
            self.trace.columns[step] = max(self.trace.columns[step], scratch.columns)
            self.trace.fresh[step] = max(self.trace.fresh[step], self.made + scratch.nbytes + scratch.kept)
            self.trace.rows[step] = outputs[0].shape[2]
            for tensor in (*inputs, *outputs):
                self._take(_nbytes(tensor))


_GROUPED_MM = getattr(getattr(torch.ops.aten, "_grouped_mm", None), "default", object())


def _grouped_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The product of expert stacks: PyTorch's own shape rule takes bfloat16 only, its processor kernel any dtype."""
    dtype = out_dtype or a.dtype
    if a.dim() == 2 and b.dim() == 2:
        assert offs is not None
        return a.new_empty((offs.shape[0], a.shape[0], b.shape[1]), dtype=dtype)
    return a.new_empty((*a.shape[:-1], b.shape[-1]) if a.dim() == 3 else (a.shape[0], b.shape[-1]), dtype=dtype)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _is_written(func: Any, tensor: torch.Tensor, args: Any, kwargs: Any) -> bool:
    if not func._schema.is_mutable:
        return False
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        if value is tensor and argument.alias_info is not None and argument.alias_info.is_write:
            return True
    return False


def trace_uses(
    module: nn.Module,
    numbers_of: dict[int, int],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    unfused: bool = False,
) -> UseTrace:
    """Run ``module`` once with fake tensors and record what it uses.

    Args:
        module: a skeleton with parameters on meta (or real ones; they are not read).
        numbers_of: ``id(tensor) -> weight number`` of the module's tensors (``skeleton.Matched.numbers``).
        args, kwargs: example inputs; their values are not read.
        unfused: without the fused operators of PyTorch's attention and encoder layers (``profile.attention``).

    Raises:
        TraceError: the model cannot be run on fake tensors (data-dependent control flow, an operator without a
            shape rule, a module that cannot be copied).
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    trace = UseTrace()
    caches = _function_caches(module)
    by_storage: dict[int, int] = {}
    recorder = _Recorder(trace, by_storage, mode)
    memo: dict[int, Any] = {}
    keep: list[torch.Tensor] = []
    try:
        with _quiet(), torch.inference_mode(False), torch.no_grad():
            for tensor, _, is_parameter in tensor_names(module).values():
                with mode:
                    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
                    if is_parameter:
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                memo[id(tensor)] = fake
                keep.append(fake)
                if id(tensor) in numbers_of:
                    by_storage[fake.untyped_storage()._cdata] = numbers_of[id(tensor)]
                recorder.own(fake)
            double = copy.deepcopy(module, memo)
            numbers = {id(child): number for number, (_, child) in enumerate(double.named_modules())}
            for child in double.modules() if unfused else ():
                if can_unfuse(child):
                    unfuse(child)
            _cut(double, numbers, recorder)
            real = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
            fakes = {id(t): mode.from_tensor(t) for t in real}
            args, kwargs = tree_map(lambda v: fakes[id(v)] if isinstance(v, torch.Tensor) else v, (args, kwargs))
            with mode, recorder:
                for value in fakes.values():
                    recorder._count(value)
                out = double(*args, **kwargs)
        trace.output_bytes = sum(_nbytes(t) for t in _tensors(out))
        trace.cache_bytes = _cache_bytes(out)
    except Exception as error:
        raise TraceError(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    finally:
        _forget_fakes(caches)
    trace.activation_bytes = recorder.peak
    trace.taken = tuple(recorder.taken)
    return trace


@contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch logs a traceback for every shape rule that fails; ours is told once, in one line."""
    logger = logging.getLogger("torch")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    children = [logging.getLogger(name) for name in list(logger.manager.loggerDict) if name.startswith("torch.")]
    disabled = [child for child in children if not child.disabled]
    for child in disabled:
        child.disabled = True
    try:
        yield
    finally:
        logger.setLevel(before)
        for child in disabled:
            child.disabled = False


def _cache_bytes(out: Any) -> int:
    """Bytes of the tensors in a result's key-value cache or recurrent state, whatever class holds them."""
    get = getattr(out, "get", None)
    if not callable(get):
        return 0
    stack = [get(name) for name in ("past_key_values", "cache_params") if get(name) is not None]
    seen: set[int] = set()
    total = 0
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            total += _nbytes(value)
        elif isinstance(value, (list, tuple)):
            stack += value
        elif isinstance(value, dict):
            stack += value.values()
        elif type(value).__module__.startswith("transformers"):
            stack += vars(value).values() if hasattr(value, "__dict__") else ()
    return total


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    return (t for t in tree_flatten(value)[0] if isinstance(t, torch.Tensor))


def announces(module: nn.Module) -> bool:
    """Whether a module's entries and exits are events: it has weights, or some module in it has."""
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _cut(double: nn.Module, numbers: dict[int, int], recorder: _Recorder) -> None:
    """Make every module of the copy announce its entries and exits, as the session's wrappers will."""
    for child in list(double.modules()):
        if child is not double and not announces(child):
            continue
        number = numbers[id(child)]
        forward = child.forward

        def wrapped(*args: Any, _forward: Any = forward, _number: int = number, **kwargs: Any) -> Any:
            recorder.open_step((_number, ENTER))
            try:
                return _forward(*args, **kwargs)
            finally:
                recorder.open_step((_number, EXIT))

        child.forward = functools.wraps(forward)(wrapped)


def _function_caches(module: nn.Module) -> dict[Any, int]:
    """The ``lru_cache``s that the model's code can reach, with how many entries they hold."""
    found: dict[Any, int] = {}
    seen: set[int] = set()
    for child in module.modules():
        for cls in type(child).__mro__:
            owner = sys.modules.get(cls.__module__)
            if owner is None or id(owner) in seen or cls.__module__.startswith(("torch.", "builtins", "narrowboat.")):
                continue
            seen.add(id(owner))
            for scope in (vars(owner), *(vars(c) for c in list(vars(owner).values()) if isinstance(c, type))):
                for value in list(scope.values()):
                    if isinstance(value, functools._lru_cache_wrapper):
                        found[value] = value.cache_info().currsize
    return found


def _forget_fakes(caches: dict[Any, int]) -> None:
    """Empty the caches that grew during the trace: they could hold fake tensors."""
    for cached, before in caches.items():
        if cached.cache_info().currsize > before:
            cached.cache_clear()
