"""A model to train, and the step that trains it, from what a person named on the command line."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from narrowboat.checkpoint import open_index
from narrowboat.errors import ModelError, NarrowboatError, UsageError
from narrowboat.report.plain import load_weights
from narrowboat.train.plan import TrainPlan
from narrowboat.train.recipes.goal import Goal
from narrowboat.train.step import TrainStep
from narrowboat.zoo.folder import FolderModel
from narrowboat.zoo.resolve import ResolvedModel

LEARNING_RATE = 1e-3
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
}


@dataclass(frozen=True, slots=True)
class StepOptions:
    """How a step is made; see ``nb.train_step``.

    Attributes:
        budget: bytes.
        spill: a folder, or None.
        batch_norm: what to do about BatchNorm.
        techniques: which may be used; None for all that keep every bit.
        clip: largest 2-norm of all gradients, or None.
        optimizer: a key of ``OPTIMIZERS``.
        lr: learning rate; None for ``LEARNING_RATE``, or the one of a run that is gone on with.
    """

    budget: int
    spill: Path | None = None
    batch_norm: str = "auto"
    techniques: tuple[str, ...] | None = None
    clip: float | None = None
    optimizer: str = "adamw"
    lr: float | None = None


def plan_facts(plan: TrainPlan) -> dict[str, Any]:
    """What a plan says of itself, with the seconds that it predicts of its step and of the plain one."""
    return {**plan.as_dict(), "predicted_seconds": plan.predicted_seconds, "plain_seconds": plan.plain_seconds}


def make_model(resolved: ResolvedModel, weights: Path | None, seed: int) -> nn.Module:
    """The module in train mode.

    A model folder's weights are loaded in float32, in which an optimizer's small changes are not rounded away. Other
    models begin with the random weights of their factory unless ``weights`` are given.

    Args:
        resolved: what was named.
        weights: a weights file or folder, or None.
        seed: of torch's random stream, which goes on from here.

    Raises:
        UsageError: its factory cannot be called without arguments.
        ModelError: it is no module, or its factory fails.
        WeightsError: the weights cannot be read, or are another model's.
    """
    torch.manual_seed(seed)
    factory: Any = resolved.factory
    if isinstance(factory, FolderModel):
        model = _from_folder(factory)
    elif isinstance(factory, nn.Module):
        model = copy.deepcopy(factory)
    else:
        model = _made(resolved.spec, factory)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{resolved.spec} made a {type(model).__name__}, not an nn.Module")
    if weights is not None:
        load_weights(model, open_index(weights))
    config: Any = getattr(model, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False  # keys and values of a training pass are never used again
    return model.train()


def _made(spec: str, factory: Callable[..., Any]) -> Any:
    try:
        inspect.signature(factory).bind()
    except ValueError:
        pass  # it does not tell what it takes
    except TypeError as error:
        raise UsageError(f"{spec} is no model factory ({error}): give a function that needs no arguments") from error
    try:
        return factory()
    except NarrowboatError:
        raise
    except Exception as error:
        told = " ".join(str(error).split())[:300]
        raise ModelError(f"the model factory {spec} failed: {type(error).__name__}: {told}") from error


def _from_folder(folder: FolderModel) -> nn.Module:
    from narrowboat.profile.pretrained import open_pretrained

    kind: Any = type(open_pretrained(folder.folder).model)
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return kind.from_pretrained(folder.folder, local_files_only=True, dtype=torch.float32)
    except Exception as error:
        told = " ".join(str(error).split())[:300]
        raise ModelError(f"{folder.folder} cannot be loaded: {type(error).__name__}: {told}") from error
    finally:
        if shown:
            logging.enable_progress_bar()


def make_step(model: nn.Module, goal: Goal, options: StepOptions, *, adapt: bool = True) -> TrainStep:
    """The training step of a recipe.

    Raises:
        UsageError: an option that cannot be used.
        TrainingError: the model has nothing to train.
    """
    if options.optimizer not in OPTIMIZERS:
        raise UsageError(f"optimizer {options.optimizer!r}: choose one of {', '.join(OPTIMIZERS)}")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ModelError("the model has no parameters to train")
    return TrainStep(
        model,
        goal.loss,
        OPTIMIZERS[options.optimizer](trained, lr=LEARNING_RATE if options.lr is None else options.lr),
        budget=options.budget,
        spill=options.spill,
        batch_norm=options.batch_norm,
        techniques=options.techniques,
        clip_grad_norm=options.clip,
        adapt=adapt,
    )
