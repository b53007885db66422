"""Fused blocks: chains of maps and normalisations run as one compiled operator, where that was measured to be faster.

SAGE (Gim and Ko, MobiSys 2022) fuses operators that follow each other so that what lies between them is never
written to memory. Here a *block* is a module of the model whose forward pass is nothing but such operators. It is
traced to ATen operators, forward and backward, each is compiled by ``torch.compile``, and the block is called through
one operator of the dispatcher, ``narrowboat::fused``. The tape, the study and autograd see that operator as any other:
it saves what goes in and nothing else, it can be replayed, and no planning happens inside compiled code.

Compiled kernels round otherwise than eager ones, so nothing is fused unless ``"fuse"`` is among the techniques.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from narrowboat.errors import UsageError
from narrowboat.train.measure.real import untouched
from narrowboat.train.micro_batch import batch_size, copied, rows
from narrowboat.train.tape.facts import Kind, facts_of
from narrowboat.train.undisturbed import attributes_kept

log = logging.getLogger("narrowboat")

_FASTER = 1.1  # times; a block that gains less stays as it is
_RECORDED, _TIMED = 2, 8  # samples of the pass that shows what blocks are given, and those that they are timed on
_REPEATS = 7
_ROOM = 64 << 20  # bytes of a block's input up to which it is tried on the whole batch too
_TRACED = 4099  # rows in a trace: any number but a likely size of another dimension
# Linear code in one kernel needs no helpers; a pool of processes would outlive the step.
_OPTIONS: dict[str, Any] = {"compile_threads": 1}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Function = Callable[..., Any]


class _NotFusedError(Exception):
    """Why a block stays as it is."""


@dataclass(slots=True)
class Chain:
    """A traced block; blocks with the same graphs share one.

    Attributes:
        number: its place among all chains of the process.
        forward, backward: graphs of ATen operators: (x, parameters and buffers) to the result, and those with the
            gradient of the result to the gradients of the differentiable ones.
        run, run_backward: the same, compiled.
        differentiable: which of x and the parameters and buffers get gradients.
    """

    number: int
    forward: torch.fx.GraphModule
    backward: torch.fx.GraphModule
    run: Function
    run_backward: Function
    differentiable: tuple[bool, ...]


_chains: list[Chain] = []


# -- the operator --------------------------------------------------------------------------------------------------

torch.library.define("narrowboat::fused", "(int chain, Tensor[] tensors) -> Tensor", tags=(torch.Tag.pointwise,))
torch.library.define("narrowboat::fused_backward", "(int chain, Tensor[] tensors, Tensor grad) -> Tensor[]")


@torch.library.impl("narrowboat::fused", "CompositeExplicitAutograd")
def _fused(chain: int, tensors: list[Tensor]) -> Tensor:
    return _compiled(_chains[chain].run, tensors)


@torch.library.impl("narrowboat::fused_backward", "CompositeExplicitAutograd")
def _fused_backward(chain: int, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    return list(_compiled(_chains[chain].run_backward, [*tensors, grad]))


@torch.library.register_fake("narrowboat::fused")
def _fused_fake(chain: int, tensors: list[Tensor]) -> Any:
    return _chains[chain].forward(*tensors)


@torch.library.register_fake("narrowboat::fused_backward")
def _fused_backward_fake(chain: int, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    return list(_chains[chain].backward(*tensors, grad))


def _setup(ctx: Any, inputs: tuple[int, list[Tensor]], output: Tensor) -> None:
    ctx.chain = inputs[0]
    ctx.save_for_backward(*inputs[1])


def _send_back(ctx: Any, grad: Tensor) -> tuple[None, list[Tensor | None]]:
    tensors = list(ctx.saved_tensors)
    gradients = iter(torch.ops.narrowboat.fused_backward(ctx.chain, tensors, grad))
    return None, [next(gradients) if wanted else None for wanted in _chains[ctx.chain].differentiable]


torch.library.register_autograd("narrowboat::fused", _send_back, setup_context=_setup)


def _compiled(run: Function, tensors: Sequence[Tensor]) -> Any:
    """Call compiled code in one and the same state of autograd, so that it is compiled once for all callers."""
    given = [tensor.detach() for tensor in tensors]
    for tensor in given:
        if tensor.dim() and tensor.shape[0] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    with torch.no_grad():
        return run(*given)


# -- tracing -------------------------------------------------------------------------------------------------------


def _trace(block: nn.Module, names: Sequence[str], tensors: Sequence[Tensor], mask: tuple[bool, ...]) -> Any:
    """Graphs of ``block`` for any number of rows. Raises _NotFusedError."""
    env = ShapeEnv(duck_shape=False)
    mode = FakeTensorMode(shape_env=env)

    def fake(tensor: Tensor, first: DimDynamic) -> Tensor:
        sizes = [first if place == 0 else DimDynamic.STATIC for place in range(tensor.dim())]
        return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    def forward(*given: Tensor) -> Any:
        return torch.func.functional_call(block, dict(zip(names, given[1:], strict=True)), (given[0],))

    def backward(*given: Tensor) -> Any:
        leaves = [t.detach().requires_grad_(wanted) for t, wanted in zip(given[:-1], mask, strict=True)]
        with torch.enable_grad():
            out = forward(*leaves)
        wanted = [leaf for leaf, take in zip(leaves, mask, strict=True) if take]
        return torch.autograd.grad(out, wanted, given[-1])

    x = tensors[0]
    attributes = [dict(module.__dict__) for module in block.modules()]
    shape = fake(torch.empty((_TRACED, *x.shape[1:]), dtype=x.dtype, device="meta"), DimDynamic.DYNAMIC)
    with mode:
        fakes = [torch.empty_like(shape, device=x.device)]
    fakes += [fake(tensor.detach(), DimDynamic.STATIC) for tensor in tensors[1:]]
    with torch.no_grad():
        first = make_fx(forward)(*fakes)
        with mode:
            out = first(*fakes)
    if not isinstance(out, Tensor):
        raise _NotFusedError("its result is no tensor")
    with mode:
        gradient = torch.empty_like(out)
    second = make_fx(backward)(*fakes, gradient)
    if attributes != [dict(module.__dict__) for module in block.modules()]:
        raise _NotFusedError("it changes its own attributes")
    if env.guards:
        raise _NotFusedError("what it does depends on the number of samples")
    _check_operators(first, second)
    return first, second


def _check_operators(forward: torch.fx.GraphModule, backward: torch.fx.GraphModule) -> None:
    if any(node.op == "get_attr" for graph in (forward, backward) for node in graph.graph.nodes):
        raise _NotFusedError("it holds tensors that are neither parameters nor buffers")
    operators = [node.target for node in forward.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    work = [facts_of(operator) for operator in operators if torch.Tag.inplace_view not in operator.tags]
    work = [facts for facts in work if not facts.view and "sym_" not in facts.name]
    if len(work) < 2:
        raise _NotFusedError("it is a single operator")
    for facts in work:
        if facts.random:
            raise _NotFusedError(f"it draws random numbers ({facts.name})")
        if facts.writes or facts.writes_named:
            raise _NotFusedError(f"it writes to tensors ({facts.name})")
        if facts.kind not in (Kind.MAP, Kind.REDUCE):
            raise _NotFusedError(f"it does more than maps and normalisations ({facts.name})")


# -- blocks --------------------------------------------------------------------------------------------------------


class _Fused:
    """What a fused block's call goes to: the operator where the call is of a kind that was traced, else the block.

    It sits where ``nn.Module.compile`` puts its callable, which copies and pickles of the module leave out.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.modules = list(block.modules())
        self.names = [name for name, _ in (*block.named_parameters(), *block.named_buffers())]
        self.chains: dict[Any, Chain] = {}

    def tensors(self) -> list[Tensor]:
        """Parameters and buffers, as they are now."""
        return [*self.block.parameters(), *self.block.buffers()]

    def kind(self, x: Tensor, tensors: Sequence[Tensor]) -> Any:
        """What has to be the same for one trace to serve two calls."""
        return (
            x.shape[1:],
            x.dtype,
            x.device.type,
            tuple(tensor.requires_grad for tensor in (x, *tensors)),
            tuple(module.training for module in self.modules),
        )

    def plain(self, x: Tensor) -> bool:
        """Whether the call has to go to the block itself."""
        if not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or x.dim() == 0:
            return True
        return any(getattr(module, hooks) for module in self.modules for hooks in _HOOKS)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and not self.plain(args[0]):
            tensors = self.tensors()
            chain = self.chains.get(self.kind(args[0], tensors))
            if chain is not None:
                return torch.ops.narrowboat.fused(chain.number, [args[0], *tensors])
        return self.block._call_impl(*args, **kwargs)


class Fusion:
    """The fused blocks of a model.

    Args:
        model: whose blocks are looked at.

    Raises:
        UsageError: there is no C++ compiler for blocks on the CPU.

    Attributes:
        fused: for each fused block its name and how many times faster it was.
    """

    def __init__(self, model: nn.Module) -> None:
        on_cpu = all(parameter.device.type in ("cpu", "meta") for parameter in model.parameters())
        if on_cpu and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
            raise UsageError(
                'techniques="fuse" needs a C++ compiler (g++ or clang++, or CXX); install one or leave it out'
            )
        self._model = model
        self._blocks = {name: _Fused(module) for name, module in model.named_modules() if name and _may_be(module)}
        self._known: dict[tuple[Any, ...], tuple[Chain | None, float, str]] = {}
        self._refused: dict[str, int] = {}
        self.fused: dict[str, float] = {}

    def prepare(self, forward: Callable[[Any, Any], Any], inputs: Any, targets: Any) -> None:
        """Fuse what such a batch makes worth it; the model's tensors, modes and random streams stay as they are."""
        samples = batch_size(inputs, targets)
        seen: dict[str, Tensor] = {}
        hooks = [
            fused.block.register_forward_hook(_recorder(seen, name), with_kwargs=True)
            for name, fused in self._blocks.items()
        ]
        few = min(samples, _RECORDED)
        try:
            with untouched(self._model):
                forward(*(copied(rows(tree, samples, 0, few)) for tree in (inputs, targets)))
        finally:
            for hook in hooks:
                hook.remove()
        done: list[str] = []
        for name, x in seen.items():  # a block comes after the smaller ones inside it
            fused = self._blocks[name]
            if any(name.startswith(f"{outer}.") for outer in done) or fused.plain(x):
                continue
            tensors = fused.tensors()
            kind = fused.kind(x, tensors)
            if kind in fused.chains:
                done.append(name)
                continue
            try:
                chain, factor = self._chain(
                    fused, x, tensors, [max(1, n // few) for n in (min(samples, _TIMED), samples)]
                )
            except _NotFusedError as reason:
                self._refused[str(reason)] = self._refused.get(str(reason), 0) + 1
                continue
            fused.chains[kind] = chain
            fused.block._compiled_call_impl = fused
            self.fused[name] = factor
            done.append(name)
            log.info("%s runs as one operator, %.1f times as fast", name, factor)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why nothing is fused; nothing to tell where something is."""
        if self.fused:
            return ()
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            return ("fuse: not under autocast",)
        told = "; ".join(f"{count} of them: {reason}" for reason, count in self._refused.items())
        return (f"fuse: no block of maps and normalisations is worth it{' (' + told + ')' if told else ''}",)

    def close(self) -> None:
        """Every block is called as it was before."""
        for fused in self._blocks.values():
            if fused.block._compiled_call_impl is fused:
                del fused.block._compiled_call_impl

    def _chain(self, fused: _Fused, x: Tensor, tensors: list[Tensor], times: list[int]) -> tuple[Chain, float]:
        mask = tuple(tensor.requires_grad for tensor in (x, *tensors))
        if not any(mask):
            raise _NotFusedError("nothing in it is trained")
        if any(tensor.is_meta for tensor in tensors):
            raise _NotFusedError("its weights are on storage")
        try:
            with attributes_kept(*fused.modules):
                forward, backward = _trace(fused.block, fused.names, [x, *tensors], mask)
        except _NotFusedError:
            raise
        except Exception as error:  # tracing fails in as many ways as there is Python
            raise _NotFusedError(f"it cannot be traced ({type(error).__name__})") from error
        key = (forward.code, backward.code, mask, x.shape[1:], x.dtype, tuple((t.shape, t.dtype) for t in tensors))
        if key not in self._known:
            chain = Chain(
                len(_chains),
                forward,
                backward,
                torch.compile(forward.forward, options=_OPTIONS),
                torch.compile(backward.forward, options=_OPTIONS),
                mask,
            )
            _chains.append(chain)
            self._known[key] = _tried(fused, chain, x, times)
        found, factor, reason = self._known[key]
        if found is None:
            raise _NotFusedError(reason)
        return found, factor


def _may_be(module: nn.Module) -> bool:
    """Whether a module may be a block, by what is cheap to see: contractions have weights of two dimensions."""
    single = type(module).__module__.startswith("torch.nn.") and not any(True for _ in module.children())
    small = all(parameter.dim() <= 1 for parameter in module.parameters())
    return not single and small and module._compiled_call_impl is None and not isinstance(module, nn.ModuleList)


def _recorder(seen: dict[str, Tensor], name: str) -> Callable[..., None]:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].dim() and name not in seen:
            seen[name] = args[0].detach().clone().requires_grad_(args[0].requires_grad)

    return record


def _tried(fused: _Fused, chain: Chain, x: Tensor, times: list[int]) -> tuple[Chain | None, float, str]:
    """The chain with how many times faster it is, or None and why not.

    Args:
        x: what the block is given, for a few samples.
        times: by how much what is timed, and the whole batch, are larger.
    """
    tensors = fused.tensors()

    def eager(given: Tensor) -> list[Tensor]:
        return _with_gradients(fused.block(given), [given, *tensors])

    def compiled(given: Tensor) -> list[Tensor]:
        return _with_gradients(torch.ops.narrowboat.fused(chain.number, [given, *tensors]), [given, *tensors])

    def repeated(count: int) -> Tensor:
        return x.detach().repeat(count, *[1] * (x.dim() - 1)).requires_grad_(x.requires_grad)

    # Kernels differ by size: those of a step should be there before it begins.
    counts = [count for count in sorted({1, *times}, reverse=True) if count == 1 or x.nbytes * count <= _ROOM]
    try:
        for given in (*map(repeated, counts), x.detach()[:1].requires_grad_(x.requires_grad)):
            for ours, theirs in zip(compiled(given), eager(given), strict=True):
                if ours.shape != theirs.shape or ours.dtype != theirs.dtype or not _close(ours, theirs):
                    return None, 0.0, "compiled, it gives something else"
    except Exception as error:  # compilers fail in as many ways as there are machines
        log.info("a block could not be compiled: %s", error)
        return None, 0.0, f"it cannot be compiled ({type(error).__name__})"
    given = repeated(times[0])
    turns = [(_seconds(eager, given), _seconds(compiled, given)) for _ in range(_REPEATS)]
    factor = min(before for before, _ in turns) / min(after for _, after in turns)
    return (chain, factor, "") if factor >= _FASTER else (None, factor, "compiled, it is not faster")


def _with_gradients(out: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    gradient = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, wanted, gradient)]


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Equal but for roundings: within some hundreds of the dtype's steps of the largest value."""
    largest = float(theirs.abs().max()) if theirs.numel() else 0.0
    return torch.allclose(ours, theirs, rtol=1e-3, atol=256 * torch.finfo(theirs.dtype).eps * largest, equal_nan=True)


def _seconds(call: Callable[[Tensor], Any], given: Tensor) -> float:
    start = time.perf_counter()
    call(given)
    if given.is_cuda:
        torch.cuda.synchronize(given.device)
    return time.perf_counter() - start
