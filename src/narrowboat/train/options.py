"""What a caller gives to ``train_step`` and ``checkpoint_plan``, checked before anything is made of it."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import nn

from narrowboat.errors import TrainingError, UsageError

BATCH_NORM = ("auto", "never", "lockstep", "ghost", "frozen")
_OF_A_SCALER = ("scale", "unscale_", "step", "update")
_PLAIN = "train this model without narrowboat"
_STEP_SPARSE = (torch.optim.SGD, torch.optim.Adagrad)


def check_names(function: Callable[..., Any], given: Iterable[str]) -> None:
    """Refuse options that ``function`` has no keyword for.

    Raises:
        UsageError: with the nearest one that there is.
    """
    parameters = inspect.signature(function).parameters.values()
    known = [each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            told = f"did you mean {near[0]}=?" if near else f"there are {', '.join(known)}"
            raise UsageError(f"train_step has no option {name}=: {told}")


def check_model(model: Any) -> None:
    """Refuse what is no module.

    Raises:
        UsageError: it is none.
    """
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise UsageError(f"the model is the class {model.__name__}: give an instance of it")
    if not isinstance(model, nn.Module):
        raise UsageError(f"the model is a {type(model).__name__}: give an nn.Module")


def check_functions(loss_fn: Any, scaler: Any, count: Any) -> None:
    """Refuse a loss, a gradient scaler or a count that cannot be used as one.

    Raises:
        UsageError: one is of another kind.
    """
    if isinstance(loss_fn, type) and issubclass(loss_fn, nn.Module):
        raise UsageError(f"loss_fn is the class {loss_fn.__name__}: give an instance, {loss_fn.__name__}()")
    if loss_fn is not None and not callable(loss_fn):
        raise UsageError(
            f"loss_fn={loss_fn!r} cannot be called: give a function of output and targets, such as "
            "torch.nn.functional.mse_loss, or None where the model returns its loss"
        )
    if scaler is not None and not all(callable(getattr(scaler, name, None)) for name in _OF_A_SCALER):
        raise UsageError(f"scaler={scaler!r}: give a torch.amp.GradScaler, or None")
    if count is not None and not callable(count):
        raise UsageError(
            f"count={count!r} cannot be called: give a function of a micro-batch's inputs and targets that returns "
            "what its loss averages over"
        )


def check_settings(batch_norm: Any, clip_grad_norm: Any, micro_batches: Any) -> None:
    """Refuse a word that is none of those there are, and numbers out of range.

    Raises:
        UsageError: one cannot be used.
    """
    if batch_norm not in BATCH_NORM:
        raise UsageError(f"batch_norm={batch_norm!r}; choose one of {', '.join(BATCH_NORM)}")
    if clip_grad_norm is not None and not (_is_number(clip_grad_norm, Real) and 0 < clip_grad_norm < math.inf):
        raise UsageError(f"clip_grad_norm={clip_grad_norm!r}: give a positive number")
    if micro_batches is not None and not (_is_number(micro_batches, Integral) and micro_batches >= 1):
        raise UsageError(f"micro_batches={micro_batches!r}: give a whole number from 1 on, or None to have it chosen")


def check_parts(micro_batches: int | None, samples: int) -> None:
    """Refuse more micro-batches than there are samples.

    Raises:
        UsageError: there are more.
    """
    if micro_batches is not None and micro_batches > samples:
        raise UsageError(
            f"micro_batches={micro_batches}, and the batch has {samples} sample{'s' if samples > 1 else ''}: give "
            f"at most {samples}, or a larger batch"
        )


def check_optimizer(model: nn.Module, optimizer: Any) -> None:
    """Refuse what is no optimizer over the model, and optimizers that a step cannot call.

    Raises:
        UsageError: it is no optimizer.
        TrainingError: it is one that cannot be used, or over other parameters.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(f"optimizer is a {type(optimizer).__name__}; give a torch.optim.Optimizer over the model")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TrainingError(
            "LBFGS evaluates the loss several times per step and cannot be used here; use AdamW or SGD"
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise TrainingError(
            "SparseAdam steps sparse gradients, whose bytes cannot be foreseen: make the embeddings dense "
            f"(nn.Embedding(..., sparse=False)) and use AdamW or SGD, or {_PLAIN}"
        )
    sparse = next((name for name, module in model.named_modules() if _has_sparse_gradients(module)), None)
    kind = type(optimizer)
    if sparse is not None and kind.__module__.startswith("torch.optim") and not isinstance(optimizer, _STEP_SPARSE):
        raise TrainingError(
            f"{sparse} makes sparse gradients, which {kind.__name__} does not step: make it with sparse=False, or use "
            "SGD"
        )
    own = {id(parameter) for parameter in model.parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    strange = sum(id(parameter) not in own for parameter in held)
    if strange:
        raise TrainingError(
            f"{strange} of the optimizer's {len(held)} parameters are not the model's: build the optimizer from "
            "model.parameters() of this very model, after moving it to its device"
        )


def _has_sparse_gradients(module: nn.Module) -> bool:
    return getattr(module, "sparse", False) is True and any(p.requires_grad for p in module.parameters(recurse=False))


def folder_of(spill: Any) -> Path | None:
    """The folder that ``spill`` names; None for None.

    Raises:
        UsageError: it is no path.
    """
    if spill is None:
        return None
    if not isinstance(spill, (str, Path)) or not str(spill):
        raise UsageError(f"spill={spill!r}: give the path of a folder")
    return Path(spill)


def arguments_of(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments of a call that an example stands for.

    Raises:
        UsageError: it is neither a tensor, nor a tuple or list of arguments, nor a mapping of names.
    """
    if isinstance(example, torch.Tensor):
        return (example,), {}
    if isinstance(example, Mapping) and all(isinstance(name, str) for name in example):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    told = "a mapping whose keys are no names" if isinstance(example, Mapping) else f"a {type(example).__name__}"
    raise UsageError(
        f"the example is {told}: give the model's arguments, as a tensor, a tuple, or a dict of keyword arguments"
    )


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
