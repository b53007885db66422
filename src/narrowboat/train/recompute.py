"""``checkpoint_plan``: a recompute plan for people with their own training loop.

The model's forward pass runs on a tape made for a number of bytes; the loss, the backward pass and the optimizer are
the caller's. The plan is made for forward and backward with a stand-in loss (the model's own where it returns one,
else the sum of its outputs), and counts the outputs and their gradients, which the caller's loss holds, besides.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

from narrowboat.errors import TrainingError, UsageError
from narrowboat.machine.memory import memory_limits
from narrowboat.quantities import format_bytes
from narrowboat.train.budget import BudgetInForce
from narrowboat.train.forked import Home
from narrowboat.train.measure.chain import Rates
from narrowboat.train.measure.meter import Meter
from narrowboat.train.measure.study import study, timing_sizes
from narrowboat.train.micro_batch import batch_size, mapped, samples_in, tensors_in
from narrowboat.train.open_run import OpenRun
from narrowboat.train.options import arguments_of, check_model, folder_of
from narrowboat.train.plan import Planner, TrainPlan
from narrowboat.train.premises import Premises
from narrowboat.train.quiet import quiet_on_fake_tensors
from narrowboat.train.replay_check import keep_what_differs
from narrowboat.train.signature import signature
from narrowboat.train.spill import SpillPool, measure_bandwidth
from narrowboat.train.spill_room import plan_with_room
from narrowboat.train.state import state_bytes
from narrowboat.train.static import StaticBytes, static_bytes
from narrowboat.train.switches import Switches
from narrowboat.train.tape.run import TapeRun
from narrowboat.train.tiers import Tier

log = logging.getLogger("narrowboat")
_IN_FLIGHT = 16 << 20  # bytes on their way to storage


class PlannedForward:
    """Stands where the model's ``forward`` was; the model has it as ``model.narrowboat`` too.

    Args:
        model: gets this as its ``forward``.
        budget: as for :func:`checkpoint_plan`.
        spill: a folder, or None.
        techniques: names from ``Switches.NAMES``.
        optimizers: whose state counts to the budget.

    Attributes:
        optimizers: may be set; plans that are there already stay.
        departed: where the last pass left its plan; "" if it did not.
        planned: passes that ran on a plan, those that fit without recomputing included.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: int | str,
        *,
        spill: str | Path | None = None,
        techniques: Iterable[str] | None = None,
        optimizers: Iterable[torch.optim.Optimizer] = (),
    ) -> None:
        check_model(model)
        if isinstance(model, torch.jit.ScriptModule):
            raise UsageError(
                "a scripted module runs no Python that could be planned; give the module before scripting"
            )
        before = model.__dict__.get("forward")
        if isinstance(before, PlannedForward):
            before.close()
            before = model.__dict__.get("forward")
        if isinstance(techniques, Iterator):
            techniques = tuple(techniques)
        self._options: dict[str, Any] = {"spill": folder_of(spill), "techniques": techniques}
        self._techniques = Switches.of(techniques).planner
        self._budget = BudgetInForce(budget, adapt=False)
        self.optimizers = list(optimizers)
        self._model = model
        self._original = before
        self._pool: SpillPool | None = None
        self._rates = Rates()
        self._planners: dict[Hashable, Planner] = {}
        self._plans: dict[Hashable, TrainPlan] = {}
        self._last: TrainPlan | None = None
        self._home = Home()
        self._closed = False
        self.departed = ""
        self.planned = 0
        # Its signature and documentation are asked for (transformers.Trainer does).
        functools.update_wrapper(self, before or MethodType(type(model).forward, model), updated=())
        model.__dict__["forward"] = model.__dict__["narrowboat"] = self

    # -- for the user --------------------------------------------------------------------------------------------

    @property
    def plan(self) -> TrainPlan:
        """The plan of the last pass, or of the example.

        Raises:
            TrainingError: no pass was planned yet.
        """
        if self._last is None:
            raise TrainingError("no pass was planned yet: call the model with gradients on")
        return self._last

    @property
    def budget(self) -> int:
        """Bytes; may be set between steps (an int or "1.5GiB")."""
        return self._budget.now

    @budget.setter
    def budget(self, value: int | str) -> None:
        self._budget.set(value)
        self._plans.clear()

    def prepare(self, *args: Any, **kwargs: Any) -> TrainPlan:
        """Plan for such a call of the model without making it.

        Raises:
            BudgetError: no plan fits, with the minimum and the part that sets it.
            TrainingError: the batch is empty, or the model fails on it.
        """
        samples_in((args, kwargs))
        self._last = self._plan_for((args, kwargs))
        return self._last

    def close(self) -> None:
        """Put the forward back as it was. Call it between a backward and the next forward pass."""
        self._closed = True
        if self._model.__dict__.get("forward") is self:
            del self._model.__dict__["forward"]
            if self._original is not None:
                self._model.__dict__["forward"] = self._original
        if self._model.__dict__.get("narrowboat") is self:
            del self._model.__dict__["narrowboat"]
        if self._pool is not None and not self._home.left:
            self._pool.close()
        self._pool = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass, on its plan where gradients are asked for.

        Raises:
            BudgetError: a kind of input that was not seen before, and no plan fits.
            TrainingError: activations go to storage, and this process was forked from the one that plans.
        """
        if self._closed or not torch.is_grad_enabled() or _is_watched() or not self._trains((args, kwargs)):
            return self._call(args, kwargs)
        if not batch_size((args, kwargs)):
            return self._call(args, kwargs)
        if self._pool is not None:
            self._home.check()
        plan = self._plan_for((args, kwargs))
        self._last, self.departed = plan, ""
        self.planned += 1
        if plan.step is None:
            return self._call(args, kwargs)
        run = OpenRun(plan.step, self._pool)
        try:
            with run.forward():
                output = self._clean_call(args, kwargs)
                run.watch(_tensors_of(output))
        except BaseException:
            run.close()
            raise
        if run.departed is not None:
            at, name, expected = run.departed
            self.departed = f"operator {at} ({name} instead of {expected})"
        return output

    # -- the model as it is --------------------------------------------------------------------------------------

    def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self._original is not None:
            return self._original(*args, **kwargs)
        return type(self._model).forward(self._model, *args, **kwargs)

    def _clean_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        # Copies that autocast made of weights belong to one graph each.
        torch.clear_autocast_cache()
        output = self._call(args, kwargs)
        torch.clear_autocast_cache()
        return output

    def _trains(self, inputs: Any) -> bool:
        trained = any(parameter.requires_grad for parameter in self._model.parameters())
        return trained or any(tensor.requires_grad for tensor in tensors_in(inputs))

    # -- plans ---------------------------------------------------------------------------------------------------

    def _plan_for(self, inputs: Any) -> TrainPlan:
        key = signature(self._model, inputs)
        planner = self._planners.get(key)
        if planner is None or batch_size(inputs) > planner.batch:
            planner = self._planners[key] = self._measured(inputs)
            self._plans.pop(key, None)
        if key not in self._plans:
            self._plans[key] = plan_with_room(planner, self.budget, self._pool, log.warning)
            log.info("plan for %s:\n%s", format_bytes(self.budget), self._plans[key])
        return self._plans[key]

    def _measured(self, inputs: Any) -> Planner:
        self._open_pool()
        output_bytes = _OutputBytes()
        attached = [tensor.requires_grad for tensor in tensors_in(inputs)]

        @quiet_on_fake_tensors
        def forward(some_inputs: Any, _: Any) -> torch.Tensor:
            output = self._clean_call(*_attached(some_inputs, attached))
            output_bytes.note(batch_size(some_inputs), output)
            return _stand_in_loss(output)

        made = study(self._model, forward, inputs, None)
        static = self._static(inputs, output_bytes.at(made.batch))
        made.room = self.budget
        room = self.budget - static.total
        sizes = timing_sizes(made.batch, lambda size: made.tape(size).saved_bytes * 1.5 < room)
        if sizes:
            made.time(self._model, forward, inputs, None, sizes)
        techniques = self._techniques
        if any(parameter.is_cuda for parameter in self._model.parameters()):
            techniques = replace(techniques, compact=False)  # which is for memory of the CPU
        premises = Premises(
            tiers=(Tier("memory", static),),
            splittable="the loop is the caller's",
            techniques=techniques,
            rates=self._rates,
            in_flight=_IN_FLIGHT + (self._pool.staging_bytes if self._pool is not None else 0),
            spare=memory_limits().available + static.weights,
            parts=1,
        )
        planner = Planner(made, premises)
        keep_what_differs(planner, self._model, forward, inputs, None)
        return planner

    def _static(self, inputs: Any, outputs: int) -> StaticBytes:
        static = static_bytes(self._model, None, inputs, None)
        optimizer = sum(state_bytes(each) for each in self.optimizers)
        return replace(static, batch=static.batch + outputs, optimizer=optimizer)

    def _open_pool(self) -> None:
        folder = self._options["spill"]
        if folder is not None and self._pool is None and self._techniques.spill:
            self._pool = SpillPool(folder, in_flight=_IN_FLIGHT)
            write, read = measure_bandwidth(self._pool.folder)
            self._rates = Rates(write=1 / write, read=1 / read)

    # -- copies of the model -------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> PlannedForward:
        """A copied model has a plan of its own, measured when it is first used."""
        if id(self._model) not in memo:
            return copy.deepcopy(self._model, memo).__dict__["narrowboat"]
        twin = _restored(memo[id(self._model)], copy.deepcopy(self._original, memo), self.budget, self._options)
        memo[id(self)] = twin
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self._model, self._original, self.budget, self._options)


def checkpoint_plan(
    model: nn.Module,
    example: tuple[Any, ...] | Mapping[str, Any] | torch.Tensor,
    budget: int | str,
    *,
    spill: str | Path | None = None,
    techniques: Iterable[str] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """The same model with a recompute plan applied to its forward; loss, backward and optimizer stay the caller's.

    Gradients are those of the plain model, bit by bit. Other shapes than the example's are measured when they first
    come; calls without gradients go straight through. ``model.narrowboat`` has ``.plan``, ``.budget`` (settable) and
    ``.close()``, which puts the forward back. Second derivatives (``create_graph=True``) are refused.

    Args:
        model: any eager module, also wrapped in ``DistributedDataParallel``; changed in place. Copies of it
            (``deepcopy``, ``pickle``) have plans of their own.
        example: a call's arguments: a tuple of positional or a mapping of keyword arguments, or a single tensor.
        budget: bytes for what training holds: weights, buffers, gradients, batch, activations, the model's outputs
            with their gradients; as for ``train_step``, but for optimizer state, which counts only if ``optimizer``
            is given. For one graph at a time; what a loss outside the model saves comes on top. An int, "1.5GiB", or
            "auto" (what the machine can spare).
        spill: a folder for activations; None for no storage.
        techniques: among "recompute", "reduce", "compact" and "spill"; None for all.
        optimizer: whose state counts to the budget.

    Returns:
        ``model``.

    Raises:
        BudgetError: no plan fits, with the minimum and the part that sets it; the model is as it was.
        TrainingError: the example is empty, or the model fails on it.
        UsageError: an option that cannot be used as given.
    """
    args, kwargs = arguments_of(example)
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(f"optimizer is a {type(optimizer).__name__}: give a torch.optim.Optimizer, or None")
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    if spill is not None and isinstance(inner, nn.Module) and any(p.is_cuda for p in inner.parameters()):
        raise UsageError("activations of a GPU are spilled by nb.train_step only: leave spill= out")
    optimizers = [] if optimizer is None else [optimizer]
    planned = PlannedForward(inner, budget, spill=spill, techniques=techniques, optimizers=optimizers)
    try:
        planned.prepare(*args, **kwargs)
    except BaseException:
        planned.close()
        raise
    model.__dict__["narrowboat"] = planned
    return model


class _OutputBytes:
    """Bytes of the model's outputs and of the gradients that a loss outside sends back, per number of samples."""

    def __init__(self) -> None:
        self._seen = (1, 0)

    def note(self, samples: int, output: Any) -> None:
        held = _tensors_of(output)
        sent = [] if _own_loss(output) is not None else [tensor for tensor in held if tensor.requires_grad]
        self._seen = (max(samples, 1), sum(tensor.numel() * tensor.element_size() for tensor in (*held, *sent)))

    def at(self, samples: int) -> int:
        seen, nbytes = self._seen
        return -(-nbytes * samples // seen)


def _attached(inputs: Any, attached: list[bool]) -> Any:
    """The inputs as leaves of a graph of their own, where the caller's require gradients."""
    left = iter(attached)
    return mapped(lambda tensor: tensor.detach().requires_grad_() if next(left) else tensor, inputs)


def _stand_in_loss(output: Any) -> torch.Tensor:
    loss = _own_loss(output)
    if loss is not None:
        return loss
    sent = [tensor.sum() for tensor in _tensors_of(output) if tensor.requires_grad]
    if not sent:
        raise TrainingError(
            "no output of the model depends on a parameter or an input that requires a gradient, so there is nothing "
            "to plan: call it under torch.no_grad(), or let something require a gradient"
        )
    return torch.stack([term.reshape(()).to(sent[0].device, sent[0].dtype) for term in sent]).sum()


def _own_loss(output: Any) -> torch.Tensor | None:
    """The loss that the model returns (as Hugging Face's do), or None."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.requires_grad else None


def _tensors_of(output: Any) -> list[torch.Tensor]:
    leaves = tree_leaves(output)
    found = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    others = [leaf for leaf in leaves if hasattr(leaf, "__dict__") and not isinstance(leaf, (torch.Tensor, nn.Module))]
    found += [value for leaf in others for value in vars(leaf).values() if isinstance(value, torch.Tensor)]
    return [tensor for tensor in found if tensor.is_floating_point() or tensor.is_complex()]


def _is_watched() -> bool:
    """Whether this pass is part of one that is on a tape, or is measured, already."""
    return any(isinstance(mode, (TapeRun, Meter)) for mode in _get_current_dispatch_mode_stack())


def _restored(model: nn.Module, original: Any, budget: int, options: dict[str, Any]) -> PlannedForward:
    """For a copy of a model that may not have its attributes yet."""
    if original is not None:
        model.__dict__["forward"] = original
    return PlannedForward(model, budget, **options)
