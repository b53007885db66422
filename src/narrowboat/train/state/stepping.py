"""An optimizer's own step over some of its parameters, and a check that this is the same as its step over all.

An optimizer whose update is per parameter can be shown a part of its parameters at a time: ``param_groups`` is
replaced, for the length of one call, by groups with the same settings and fewer parameters. Nothing is known about any
optimizer by name; whether its update is per parameter is found out on a small copy of it.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from narrowboat.errors import TrainingError

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)  # sizes of a small copy's dimensions: each tells which one it was
_OWN = ("state", "param_groups", "defaults")
_SCALARS = (int, float, bool, str, type(None))
Changes = dict[tuple[int, str], Any]


def all_parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    """Its parameters, in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@contextmanager
def _without_hooks(optimizer: Optimizer) -> Iterator[None]:
    """A step of a subclass that calls its base's would run the hooks for every part."""
    before, after = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = before, after


def step_some(optimizer: Optimizer, parameters: Iterable[torch.Tensor]) -> Changes:
    """Let ``optimizer`` step these parameters and no others; its step hooks are not run.

    Returns:
        What the step changed in the settings of its groups, by number of the group and key; the groups themselves
        are as they were, so that the next part of the parameters sees what this one saw.
    """
    wanted = {id(parameter) for parameter in parameters}
    whole = optimizer.param_groups
    part = [{**group, "params": [p for p in group["params"] if id(p) in wanted]} for group in whole]
    try:
        optimizer.param_groups = [group for group in part if group["params"]]
        with _without_hooks(optimizer):
            _bare_step(optimizer)
    finally:
        optimizer.param_groups = whole
    return {
        (number, key): value
        for number, (group, seen) in enumerate(zip(part, whole, strict=True))
        if group["params"]
        for key, value in group.items()
        if key != "params" and _differs(value, seen.get(key))
    }


def _bare_step(optimizer: Optimizer) -> None:
    """The class's own step: without the hooks that torch puts around it, or what wraps it in the instance."""
    step = type(optimizer).step
    (getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step)(optimizer)


def apply_changes(optimizer: Optimizer, changes: Changes) -> None:
    """Set what :func:`step_some` found changed, once all parts have been stepped."""
    for (number, key), value in changes.items():
        optimizer.param_groups[number][key] = value


def run_pre_hooks(optimizer: Optimizer) -> None:
    """The hooks of ``register_step_pre_hook`` and of all optimizers, once."""
    hooks = [*torch_optimizer._global_optimizer_pre_hooks.values(), *optimizer._optimizer_step_pre_hooks.values()]
    for hook in hooks:
        hook(optimizer, (optimizer,), {})


def run_post_hooks(optimizer: Optimizer) -> None:
    """The hooks of ``register_step_post_hook`` and of all optimizers, once."""
    hooks = [*optimizer._optimizer_step_post_hooks.values(), *torch_optimizer._global_optimizer_post_hooks.values()]
    for hook in hooks:
        hook(optimizer, (optimizer,), {})
    # What a learning-rate scheduler looks at to tell whether it was called too early.
    optimizer._opt_called = True  # type: ignore[attr-defined]


def small_copy(optimizer: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """An optimizer with the same settings over other parameters, without state, hooks or wrappers of its step."""
    twin = type(optimizer).__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if name != "step":
            twin.__dict__[name] = copy.copy(value) if isinstance(value, dict | list | set) else value
    for name in list(vars(twin)):
        if name.endswith("_hooks"):
            twin.__dict__[name] = OrderedDict()
    twin.param_groups = groups
    twin.state = defaultdict(dict)
    return twin


def small_parameter(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter of the same dtype, device and number of dimensions with distinct small sizes."""
    shape = tuple(PRIMES[i % len(PRIMES)] for i in range(parameter.dim()))
    return torch.nn.Parameter(torch.randn(shape).to(parameter.device, parameter.dtype))


def check_per_parameter(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose update of one parameter depends on the others.

    It is seen on a small copy: three steps over a few parameters at once, and the same over one at a time, have to
    give the same bits of parameters, state and settings.

    Raises:
        TrainingError: it does depend, or that cannot be found out; says why.
    """
    kind = type(optimizer).__name__
    advice = "keep its state in memory (no folder for the optimizer), or use an optimizer such as AdamW or SGD"
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TrainingError(
            f"{kind} evaluates the loss again and again within one step (it needs a closure), over all parameters at "
            f"once; it cannot be stepped part by part: {advice}"
        )
    known = {id(parameter) for parameter in all_parameters(optimizer)}
    for name, value in vars(optimizer).items():
        if name not in _OWN and _refers_to(value, known):
            raise TrainingError(f"{kind} keeps parameters or an optimizer in .{name}: it steps all at once; {advice}")
    devices = [d for d in {p.device for p in all_parameters(optimizer)} if d.type == "cuda"]
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        at_once, one_by_one = _twins(optimizer)
        try:
            generator = torch.Generator().manual_seed(1)
            for _ in range(3):
                grads = [torch.randn(p.shape, generator=generator).to(p) for p in all_parameters(at_once)]
                _step_with(at_once, grads, [all_parameters(at_once)])
                _step_with(one_by_one, grads, [[p] for p in all_parameters(one_by_one)])
        except Exception as error:
            raise TrainingError(
                f"cannot tell whether {kind} treats each parameter by itself, as its step fails on a small copy "
                f"({type(error).__name__}: {error}); {advice}"
            ) from error
    for number, (one, other) in enumerate(zip(all_parameters(at_once), all_parameters(one_by_one), strict=True)):
        if _differs(one.detach(), other.detach()) or _differs(at_once.state.get(one), one_by_one.state.get(other)):
            raise TrainingError(
                f"{kind} changes a parameter (number {number} of a small copy) differently when others are there: its "
                f"update is not per parameter, or it draws random numbers; {advice}"
            )
    strangers = [k for k in at_once.state if all(k is not p for p in all_parameters(at_once))]
    groups = zip(at_once.param_groups, one_by_one.param_groups, strict=True)
    attributes = [
        name
        for name, value in vars(at_once).items()
        if name not in _OWN and isinstance(value, _SCALARS) and value != vars(one_by_one).get(name)
    ]
    if strangers or attributes or any(_differs(_settings(a), _settings(b)) for a, b in groups):
        raise TrainingError(f"{kind} keeps state that belongs to no single parameter; {advice}")


def _step_with(optimizer: Optimizer, grads: list[torch.Tensor], parts: list[list[torch.Tensor]]) -> None:
    """One whole step of a small copy with those gradients, part by part."""
    for parameter, grad in zip(all_parameters(optimizer), grads, strict=True):
        parameter.grad = grad.clone()
    changes: Changes = {}
    for part in parts:
        changes.update(step_some(optimizer, part))
    apply_changes(optimizer, changes)


def _twins(optimizer: Optimizer) -> tuple[Optimizer, Optimizer]:
    """Two small copies alike: of every group, one parameter of each number of dimensions, and one of them twice."""
    twins = []
    chosen = []
    for group in optimizer.param_groups:
        ranks = list({p.dim(): p for p in group["params"]}.values())
        chosen.append((group, [small_parameter(p) for p in [*ranks, *ranks[:1]]]))
    for _ in range(2):
        groups = [
            {**group, "params": [torch.nn.Parameter(p.detach().clone()) for p in small]} for group, small in chosen
        ]
        twins.append(small_copy(optimizer, groups))
    return twins[0], twins[1]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _refers_to(value: Any, parameters: set[int]) -> bool:
    if isinstance(value, Optimizer) or id(value) in parameters:
        return True
    if isinstance(value, dict):
        return any(_refers_to(each, parameters) for each in (*value.keys(), *value.values()))
    return isinstance(value, list | tuple | set) and any(_refers_to(each, parameters) for each in value)


def _differs(one: Any, other: Any) -> bool:
    if one is other:
        return False
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
            return True
        same = one.shape == other.shape and one.dtype == other.dtype
        return not (same and torch.equal(one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() != other.keys() or any(_differs(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) != len(other) or any(_differs(a, b) for a, b in zip(one, other, strict=True))
    return type(one) is not type(other) or bool(one != other)
