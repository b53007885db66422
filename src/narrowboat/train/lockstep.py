"""BatchNorm that is exact although the batch is split: micro-batches run in lockstep and meet at each BatchNorm.

Gradient accumulation gives every micro-batch its own statistics, so BatchNorm computes something else than it would
for the whole batch. Here K micro-batches run as K threads that pass a baton: exactly one runs at any time, in order 0
to K-1. Where one reaches a BatchNorm it hands in the moments of its own samples and waits; when all have come, the
moments of the whole batch are known (:mod:`narrowboat.train.joint_norm`), running statistics move once, and each goes
on and normalises its own samples with them. The losses hang on one graph: one backward pass over their sum gives the
gradients of the whole batch, to rounding.

Threads, because a forward pass is arbitrary Python that has to stop in the middle; a baton, because nothing is to run
at the same time: random numbers are drawn in a fixed order, and one micro-batch at a time uses the model.

Not met here: functional ``F.batch_norm`` outside a BatchNorm module. Refused: a BatchNorm inside
``torch.utils.checkpoint``, which would run it again in backward, when the meeting is long over.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from narrowboat.errors import TrainingError
from narrowboat.train.batch_statistics import not_for_lockstep, uses_batch_statistics
from narrowboat.train.graph_order import BackwardOrder
from narrowboat.train.joint_norm import Moments, joined, moments, normalised
from narrowboat.train.thread_state import carried_over

Contexts = Callable[[int], AbstractContextManager[Any]]


def run_in_lockstep(
    model: nn.Module,
    calls: Sequence[Callable[[], Tensor]],
    contexts: Contexts = lambda part: nullcontext(),
) -> list[Tensor]:
    """Run the forward calls of K micro-batches so that each BatchNorm of ``model`` sees all of them as one batch.

    Args:
        model: its BatchNorm modules with batch statistics are where the calls meet. Their ``forward`` is replaced for
            the duration and put back.
        calls: one per micro-batch, in order; each runs the model once on its part of the batch and returns a tensor,
            as a rule the weighted loss of that part. Parts may differ in size.
        contexts: what to enter around call ``k``, in its thread: hooks on saved tensors, dispatch modes. Grad mode,
            autocast and the default device are carried over from the caller.

    Returns:
        What the calls returned, attached to one graph: call ``backward()`` once, on their sum.

    Raises:
        TrainingError: the calls do not come to the same BatchNorms in the same order, or one of them cannot be met.
        Exception: what a call raised. The other calls have been ended, and BatchNorm's buffers are as before.
    """
    if len(calls) == 1:
        with contexts(0):
            return [calls[0]()]
    refused = not_for_lockstep(model)
    if refused:
        name, reason = next(iter(refused.items()))
        raise TrainingError(f"no lockstep at {name or 'model'}: {reason}; do not split the batch")
    run = _Lockstep(calls, contexts)
    with run.meeting_at(model):
        try:
            return run.to_the_end()
        except BaseException:
            run.abandon()
            raise


def run_as_one_of_many(model: nn.Module, call: Callable[[], Tensor]) -> Tensor:
    """Run one forward call as a micro-batch in lockstep would run, but alone: for measuring what one of them takes.

    Dispatch modes and hooks on saved tensors of this thread go on in the call, and see nothing of the meetings.
    """
    modes = _get_current_dispatch_mode_stack()
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)

    @contextmanager
    def entered(part: int) -> Iterator[None]:
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            if hooks is not None:
                stack.enter_context(saved_tensors_hooks(*hooks))
            yield

    with _disable_current_modes():
        run = _Lockstep([call], entered)
        with run.meeting_at(model):
            try:
                return run.to_the_end()[0]
            except BaseException:
                run.abandon()
                raise


@dataclass
class _Visit:
    """A micro-batch that waits at a BatchNorm with the moments of its samples."""

    module: _BatchNorm
    norm: inspect.BoundArguments  # of F.batch_norm
    moments: Moments


class _Abandoned(BaseException):
    """Unwinds a micro-batch whose neighbour failed; not an Exception, so that no model catches it."""


class _Part:
    """One micro-batch: a thread that runs only between :meth:`turn` and its next visit or its end."""

    def __init__(self, index: int, call: Callable[[], Tensor]) -> None:
        self.index = index
        self.visit: _Visit | None = None
        self.answer: Moments | None = None
        self.result: Tensor | None = None
        self.error: BaseException | None = None
        self._abandoned = False
        self._forward = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._body, args=(call,), name=f"lockstep-{index}", daemon=True)

    def turn(self) -> None:
        """Let it run to its next visit or to its end."""
        self.visit = None
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._forward.release()
        self._back.acquire()

    def meet(self, visit: _Visit) -> Moments:
        """In its own thread: hand the baton back, wait, and return the moments of all."""
        self.visit = visit
        self._back.release()
        self._forward.acquire()
        if self._abandoned or self.answer is None:
            raise _Abandoned
        answer, self.answer = self.answer, None
        return answer

    def end(self, abandon: bool) -> None:
        """Wait for the thread; with ``abandon``, unwind it from wherever it is first."""
        self._abandoned = abandon
        if self._thread.ident is not None:
            if abandon:
                self._forward.release()
            self._thread.join()
        self.visit = self.answer = None

    def _body(self, call: Callable[[], Tensor]) -> None:
        try:
            self.result = call()
        except _Abandoned:
            pass
        except BaseException as error:  # it is raised in the caller
            self.error = error
        finally:
            self._back.release()


class _Lockstep:
    def __init__(self, calls: Sequence[Callable[[], Tensor]], contexts: Contexts) -> None:
        self._here = threading.local()
        self._order = BackwardOrder(len(calls))
        self._names: dict[nn.Module, str] = {}
        self._before: dict[_BatchNorm, dict[str, Tensor]] = {}
        self._batches: dict[_BatchNorm, Tensor] = {}
        carry = carried_over()
        self._parts = [_Part(i, self._body(i, call, contexts, carry)) for i, call in enumerate(calls)]

    def to_the_end(self) -> list[Tensor]:
        while True:
            for part in self._parts:
                part.turn()
                if part.error is not None:
                    raise part.error
            visits = [part.visit for part in self._parts]
            waiting = [visit for visit in visits if visit is not None]
            if not waiting:
                break
            if len(waiting) < len(visits) or len({visit.module for visit in waiting}) > 1:
                raise TrainingError(self._parted(visits))
            answer = self._join(waiting)
            for part in self._parts:
                part.answer = answer
        for part in self._parts:
            part.end(abandon=False)
        return [part.result for part in self._parts]  # type: ignore[misc]  # each has ended without an error

    def abandon(self) -> None:
        """End every thread, one after the other, and put BatchNorm's buffers back."""
        for part in self._parts:
            part.end(abandon=True)
            part.error = part.result = None  # a traceback would keep the graph alive
        with torch.no_grad():
            for module, buffers in self._before.items():
                for name, value in buffers.items():
                    getattr(module, name).copy_(value)

    @contextmanager
    def meeting_at(self, model: nn.Module) -> Iterator[None]:
        """Replace the ``forward`` of each BatchNorm instance; the class and its other instances stay as they are."""
        replaced: list[tuple[_BatchNorm, Any]] = []
        try:
            for name, module in model.named_modules():
                if isinstance(module, _BatchNorm) and uses_batch_statistics(module):
                    self._names[module] = name or type(module).__name__
                    replaced.append((module, module.__dict__.get("forward")))
                    module.__dict__["forward"] = self._meeting_forward(module, module.forward)
            yield
        finally:
            for module, own in replaced:
                module.__dict__.pop("forward", None)
                if own is not None:
                    module.__dict__["forward"] = own

    def _body(
        self,
        index: int,
        call: Callable[[], Tensor],
        contexts: Contexts,
        carry: Callable[[Callable[[], Tensor]], Tensor],
    ) -> Callable[[], Tensor]:
        def inner() -> Tensor:
            self._here.part = self._parts[index]
            with contexts(index):
                result = call()
            if isinstance(result, Tensor):
                self._order.number_part([result], index)
            return result

        return lambda: carry(inner)

    def _meeting_forward(self, module: _BatchNorm, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            part: _Part | None = getattr(self._here, "part", None)
            if part is None or not uses_batch_statistics(module):
                return plain(*args, **kwargs)
            self._count_once(module, part)
            with _Meeting(self, module, part) as meeting:
                output = plain(*args, **kwargs)
            if not meeting.visited:
                raise TrainingError(
                    f"no lockstep at {self._names[module]}: {type(module).__name__} computes its statistics without "
                    "F.batch_norm; do not split the batch"
                )
            return output

        return forward

    def _count_once(self, module: _BatchNorm, part: _Part) -> None:
        """Each micro-batch is about to add one to ``num_batches_tracked``, but they are one batch."""
        with _disable_current_modes():  # bookkeeping, that no tape should see
            self._noted(module, part)

    def _noted(self, module: _BatchNorm, part: _Part) -> None:
        if module not in self._before:
            if _inside_recompute():
                raise TrainingError(
                    f"no lockstep at {self._names[module]}: the model recomputes it by itself "
                    "(torch.utils.checkpoint); switch that off, or do not split the batch"
                )
            kept = {n: b.clone() for n, b in module.named_buffers(recurse=False)}
            self._before[module] = kept
        tracked = module.num_batches_tracked
        if tracked is None:
            return
        if part.index == 0 or module not in self._batches:  # the first to come to a meeting
            self._batches[module] = tracked.clone()
        else:
            with torch.no_grad():
                tracked.copy_(self._batches[module])

    def visit(self, module: _BatchNorm, part: _Part, norm: inspect.BoundArguments) -> Tensor:
        """In a micro-batch's thread: take part in the meeting, then normalise its own samples."""
        x = norm.arguments["input"]
        local = moments(x)
        self._order.number_part([local.mean, local.var], part.index)
        joint = part.meet(_Visit(module, norm, local))
        given = norm.arguments
        return normalised(x, joint.mean, joint.var, given["weight"], given["bias"], given["eps"])

    def _join(self, visits: Sequence[_Visit]) -> Moments:
        """In the caller's thread: the moments of all, and the running statistics moved once."""
        joint = joined([visit.moments for visit in visits])
        if joint.count <= 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got {joint.count} in all micro-batches"
            )
        self._order.number_meeting([joint.mean, joint.var])
        given = visits[0].norm.arguments
        with torch.no_grad():
            unbiased = joint.var * (joint.count / (joint.count - 1))
            for running, now in ((given["running_mean"], joint.mean), (given["running_var"], unbiased)):
                if running is not None:
                    running.copy_(torch.lerp(running.double(), now, given["momentum"]))
        return joint

    def _parted(self, visits: Sequence[_Visit | None]) -> str:
        ways: dict[str, list[str]] = {}
        for index, visit in enumerate(visits):
            place = "its end" if visit is None else f"BatchNorm {self._names[visit.module]}"
            ways.setdefault(place, []).append(str(index))
        told = ", ".join(f"{place} (micro-batch {' '.join(who)})" for place, who in ways.items())
        return (
            f"lockstep: micro-batches took different ways through the model and came to {told}; "
            "its forward depends on the data: do not split the batch"
        )


class _Meeting(TorchFunctionMode):
    """Inside one BatchNorm's ``forward``: the call that normalises becomes a visit. Subclasses keep what they add."""

    def __init__(self, run: _Lockstep, module: _BatchNorm, part: _Part) -> None:
        super().__init__()
        self._run, self._module, self._part = run, module, part
        self.visited = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        signature = _SIGNATURES.get(func)
        if signature is not None:
            norm = signature.bind(*args, **(kwargs or {}))
            norm.apply_defaults()
            if norm.arguments["training"]:
                self.visited = True
                return self._run.visit(self._module, self._part, norm)
        return func(*args, **(kwargs or {}))


def _torch_batch_norm(
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: Any,
    momentum: Any,
    eps: Any,
    cudnn_enabled: Any,
) -> None:
    """The parameters of ``torch.batch_norm``, which has no signature to inspect."""


_SIGNATURES: dict[Any, inspect.Signature] = {
    F.batch_norm: inspect.signature(F.batch_norm),
    torch.batch_norm: inspect.signature(_torch_batch_norm),
}


def _inside_recompute() -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back
    return False
