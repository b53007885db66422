"""Which modules make the samples of a batch depend on each other, or change with every forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from narrowboat.errors import TrainingError


def modules_with_batch_statistics(model: nn.Module) -> list[str]:
    """Names of the modules whose output for one sample depends on the other samples of its batch.

    These are the BatchNorm family in train mode (subclasses, SyncBatchNorm, lazy and scripted ones, and the one inside
    torch's quantisation-aware ``ConvBn``), BatchNorm without running statistics in either mode, and fake-quantise
    modules whose range follows the batch. LayerNorm, GroupNorm and InstanceNorm are not among them.
    """
    return [name for name, module in model.named_modules() if uses_batch_statistics(module)]


def modules_that_move_with_each_pass(model: nn.Module) -> list[str]:
    """Names of the modules in train mode whose buffers advance by one step per forward pass, besides those above.

    Their samples are independent, but K micro-batches move them K times and a later micro-batch sees them moved:
    InstanceNorm with running statistics and spectral norm (both of torch's forms).
    """
    return [name for name, module in model.named_modules() if module.training and _moves(module)]


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether this module, not counting its children, couples the samples of a batch now."""
    if isinstance(module, _BatchNorm):
        # F.batch_norm's own rule: without running statistics there is nothing else to normalise with.
        return module.training or (module.running_mean is None and module.running_var is None)
    if isinstance(module, torch.jit.ScriptModule):
        return module.training and "BatchNorm" in str(getattr(module, "original_name", ""))
    return _conv_batch_norm_in_two_passes(module) or _follows_range(module)


def not_for_lockstep(model: nn.Module) -> dict[str, str]:
    """Modules with batch statistics that micro-batches in lockstep cannot make exact: name to reason."""
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if not uses_batch_statistics(module):
            continue
        if isinstance(module, torch.jit.ScriptModule):
            reasons[name] = "scripted: its forward cannot be met"
        elif not isinstance(module, _BatchNorm):
            reasons[name] = f"{type(module).__name__} follows the range of what it sees, in its own way"
        elif isinstance(module, nn.SyncBatchNorm) and _world_size() > 1:
            reasons[name] = "SyncBatchNorm over several processes"
    return reasons


@contextmanager
def frozen_batch_norm(model: nn.Module) -> Iterator[list[str]]:
    """Every BatchNorm in train mode normalises with its running statistics inside; yields their names.

    This is ``batch_norm="frozen"``: samples no longer depend on each other and the statistics stand still, which is
    not what the plain step does. (``batch_norm="ghost"`` needs no helper: each micro-batch runs with its own
    statistics, as under gradient accumulation everywhere else; running statistics move once per micro-batch.)

    Raises:
        TrainingError: a BatchNorm has no running statistics to use.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and uses_batch_statistics(m)}
    bare = [name for name, module in found.items() if module.running_mean is None]
    if bare:
        raise TrainingError(
            f"BatchNorm {bare[0] or 'model'} has no running statistics (track_running_stats=False) and cannot be "
            "frozen; do not split the batch, or use batch_norm='lockstep'"
        )
    for module in found.values():
        module.training = False  # not .eval(): a subclass may do more there
    try:
        yield list(found)
    finally:
        for module in found.values():
            module.training = True


def _moves(module: nn.Module) -> bool:
    if isinstance(module, _InstanceNorm):
        return module.track_running_stats
    if isinstance(module, nn.utils.parametrizations._SpectralNorm):
        return True
    return any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())


def _conv_batch_norm_in_two_passes(module: nn.Module) -> bool:
    """torch's quantisation-aware ConvBn has a slow path that takes the statistics without calling its BatchNorm."""
    inner: Any = getattr(module, "bn", None)
    slow = getattr(module, "_enable_slow_path_for_better_numerical_stability", False)
    return bool(slow) and isinstance(inner, _BatchNorm) and inner.training


def _follows_range(module: nn.Module) -> bool:
    """A fake-quantise module that still observes: its scale is made of the smallest and largest value in the batch."""
    enabled = getattr(module, "observer_enabled", None)
    return isinstance(enabled, torch.Tensor) and module.training and bool(enabled.any())


def _world_size() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
