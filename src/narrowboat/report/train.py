"""A training recipe from beginning to end, and what it took beside what was predicted."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from narrowboat.checkpoint.atomic_file import check_destination
from narrowboat.checkpoint.index import TORCH_SUFFIXES
from narrowboat.errors import NarrowboatError, UsageError
from narrowboat.profile.warmup import warm_up
from narrowboat.report.trainee import StepOptions, make_model, make_step, plan_facts
from narrowboat.train.plan import TrainPlan
from narrowboat.train.recipes.course import Course, held_back
from narrowboat.train.recipes.digits import NATIVE, Digits
from narrowboat.train.recipes.goal import Goal, Kind, find_goal
from narrowboat.train.recipes.images import ImageFolder, Triple
from narrowboat.train.recipes.loop import Listener, Outcome, Score, load, train
from narrowboat.train.recipes.saved import SavedRun, open_run, save_run, state_path
from narrowboat.train.recipes.text import BYTES, Blocks, LabelledTexts, encoder, find_tokenizer, read_tokens
from narrowboat.train.report import StepRecord
from narrowboat.train.step import TrainStep
from narrowboat.zoo.folder import FolderModel
from narrowboat.zoo.resolve import ResolvedModel, resolve_model

DIGITS = "digits"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to train on, and for how long.

    Attributes:
        data: an image folder, a text file, or ``DIGITS``.
        batch: samples per step.
        epochs, steps: see ``Course``.
        validation: share of the samples kept back.
        seed: of the weights, the order and the random stream.
        size: height and width of images; the model's own without it.
        length: tokens of a text.
        weights: to begin with.
        out: where the weights go at the end, the state beside them.
        resume: the state of a run to go on with.
    """

    data: str
    batch: int = 32
    epochs: int = 1
    steps: int | None = None
    validation: float = 0.1
    seed: int = 0
    size: int | None = None
    length: int | None = None
    weights: Path | None = None
    out: Path | None = None
    resume: Path | None = None


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a recipe gave and took; sizes in bytes.

    Attributes:
        learned: what kind of thing.
        samples, validation_samples: how many to train on, and kept back.
        steps, planned_steps: made in all, and asked for.
        first_loss, last_loss: of this run's first and last step; None where it made none.
        scores: validations.
        samples_per_s: steps and reading the data, without planning and validation.
        seconds_per_step: median of a step by itself.
        budget_bytes, predicted_peak_bytes, measured_peak_bytes: of all steps the most; measured beyond the process
            before training, 0 where the system does not tell.
        over_budget: steps of this run whose measured peak was above the budget.
        predicted_slowdown: of the last plan, over the plain step.
        plan: the last plan.
        changes: (step, what changed) while it ran.
        stopped: it was ended early by a signal.
        wrote: files.
        batch: samples of a step.
        history: the steps of this run, the last 10,000.
    """

    learned: str
    samples: int
    validation_samples: int
    steps: int
    planned_steps: int
    first_loss: float | None
    last_loss: float | None
    scores: list[Score]
    samples_per_s: float
    seconds_per_step: float
    budget_bytes: int
    predicted_peak_bytes: int
    measured_peak_bytes: int
    over_budget: int
    predicted_slowdown: float
    plan: dict[str, Any]
    changes: list[tuple[int, str]]
    stopped: bool
    wrote: list[Path]
    batch: int = 0
    history: list[StepRecord] = field(default_factory=list)


def train_model(
    spec: str,
    recipe: Recipe,
    options: StepOptions,
    *,
    listener: Listener = Listener(),  # noqa: B008 - frozen
    planned: Callable[[TrainPlan, int], None] = lambda plan, steps: None,
    tell: Callable[[str], None] = lambda said: None,
) -> TrainReport:
    """Train ``spec`` by a recipe inside a budget.

    Args:
        spec: a model folder or ``package.module:factory``.
        recipe: data and length.
        options: of the step.
        listener: is told of steps and validations, and may end it.
        planned: called with the plan and the number of steps before the first.
        tell: called with things worth a line.

    Raises:
        UsageError: data or options that cannot be used.
        BudgetError: the budget holds no step.
        NarrowboatError: as the step; what was trained until then is saved if ``recipe.out`` is given.
    """
    if recipe.out is not None:
        _check_out(recipe.out)
    saved = open_run(recipe.resume) if recipe.resume is not None else None
    resolved = resolve_model(spec)
    text = recipe.data != DIGITS and _is_text(Path(recipe.data).expanduser())
    warm_up()  # what a first use of torch's libraries takes is the process's, not the training's
    model = make_model(resolved, recipe.weights, recipe.seed)
    goal = find_goal(
        spec,
        model,
        resolved.example,
        text=text,
        size=recipe.size,
        length=recipe.length,
        native=NATIVE if recipe.data == DIGITS else None,
    )
    data = _open_data(recipe.data, goal, resolved, model)
    rows, validation = held_back(len(data), recipe.validation, recipe.seed)
    course = Course(tuple(rows), min(recipe.batch, len(rows)), recipe.epochs, recipe.steps, recipe.seed)
    with make_step(model, goal, options) as step:
        settings = {
            "batch": course.batch,
            "seed": recipe.seed,
            "samples": len(rows),
            "optimizer": options.optimizer,
        }
        outcome = Outcome(saved.steps if saved is not None else 0)
        first = next(course.batches(outcome.steps))[1]
        planned(step.prepare(*load(goal, data, first)), course.total)
        if saved is not None:
            _go_on(saved, step, settings, options.lr)
        wrote = _train_and_save(step, goal, data, course, outcome, validation, listener, recipe.out, settings, tell)
        return _report(step, options.budget, goal, course, outcome, len(validation), wrote)


def _go_on(saved: SavedRun, step: TrainStep, settings: dict[str, Any], lr: float | None) -> None:
    saved.check(settings)
    saved.restore(step.model, step.optimizer)
    if lr is not None:
        for group in step.optimizer.param_groups:
            group["lr"] = lr


def _train_and_save(
    step: TrainStep,
    goal: Goal,
    data: Any,
    course: Course,
    outcome: Outcome,
    validation: list[int],
    listener: Listener,
    out: Path | None,
    settings: dict[str, Any],
    tell: Callable[[str], None],
) -> list[Path]:
    def save(number: int) -> None:
        if out is not None:
            save_run(out, step.model, step.optimizer, number, settings)
        listener.epoch(number)

    try:
        train(step, goal, data, course, outcome, validation=validation, listener=replace(listener, epoch=save))
    except NarrowboatError:
        if out is not None and outcome.losses:
            save_run(out, step.model, step.optimizer, outcome.steps, settings)
            tell(f"{out}: saved as it was after step {outcome.steps}")
        raise
    if out is None or not outcome.losses:
        return []
    if outcome.stopped:
        save_run(out, step.model, step.optimizer, outcome.steps, settings)
    return [out, state_path(out)]


def _report(
    step: TrainStep,
    budget: int,
    goal: Goal,
    course: Course,
    outcome: Outcome,
    validation_samples: int,
    wrote: list[Path],
) -> TrainReport:
    told = step.report().as_dict()
    return TrainReport(
        learned=goal.kind.value,
        samples=len(course.rows),
        validation_samples=validation_samples,
        steps=outcome.steps,
        planned_steps=course.total,
        first_loss=outcome.losses[0] if outcome.losses else None,
        last_loss=outcome.losses[-1] if outcome.losses else None,
        scores=outcome.scores,
        samples_per_s=outcome.samples / outcome.seconds if outcome.seconds else 0.0,
        seconds_per_step=told["seconds_per_step"],
        budget_bytes=budget,
        predicted_peak_bytes=told["predicted_peak_bytes"],
        measured_peak_bytes=told["measured_peak_bytes"],
        over_budget=told["over_budget"],
        predicted_slowdown=step.plan.predicted_slowdown,
        plan=plan_facts(step.plan),
        changes=told["changes"],
        stopped=outcome.stopped,
        wrote=wrote,
        batch=course.batch,
        history=list(step.report().steps),
    )


def _check_out(out: Path) -> None:
    """Refuse before the training what would fail after it."""
    check_destination(out, overwrite=True)
    if out.suffix.lower() in TORCH_SUFFIXES:
        raise UsageError(f"{out} is the name of a PyTorch file; call it {out.stem}.safetensors")
    if out.suffix.lower() != ".safetensors":  # what is there already may be something else, as the text to learn
        raise UsageError(f"weights are written as safetensors, and {out} is not named so: {out.name}.safetensors")


def _is_text(path: Path) -> bool:
    if path.is_dir():
        return False
    if path.is_file():
        return True
    raise UsageError(f"there is no {path}: give a folder of images, a text file, or the word {DIGITS!r}")


def _open_data(name: str, goal: Goal, resolved: ResolvedModel, model: nn.Module) -> Any:
    """The samples, checked against what the model tells apart."""
    path = Path(name).expanduser()
    if goal.kind is Kind.IMAGES:
        kind: Any = Digits if name == DIGITS else lambda *rest: ImageFolder(path, *rest)
        data: Any = kind(goal.shape, *_image_statistics(resolved))
        goal.check_classes(len(data.classes), name)
        return data
    tokenizer = find_tokenizer(resolved.factory.folder) if isinstance(resolved.factory, FolderModel) else None
    if goal.kind is Kind.TOKENS:
        tokens = read_tokens(path, tokenizer)
        goal.check_classes(BYTES if tokenizer is None else int(tokens.max(initial=0)) + 1, name)
        return Blocks(tokens, goal.shape[0], name)
    known = _vocabulary(model)
    if tokenizer is None and known < BYTES:
        raise UsageError(f"{resolved.spec} has no tokenizer and {known} tokens; for bytes it needs {BYTES}")
    data = LabelledTexts(path, encoder(tokenizer), goal.shape[0], _filler(tokenizer, model))
    goal.check_classes(len(data.classes), name)
    return data


def _image_statistics(resolved: ResolvedModel) -> tuple[Triple, Triple]:
    """Mean and deviation of the channels that the model's weights were trained with."""
    told: Any = {}
    if isinstance(resolved.factory, FolderModel):
        with suppress(OSError, ValueError):
            told = json.loads((resolved.factory.folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    mean, std = told.get("image_mean"), told.get("image_std")
    if all(isinstance(each, list) and len(each) == 3 for each in (mean, std)):
        return tuple(mean), tuple(std)
    return resolved.image_mean, resolved.image_std


def _vocabulary(model: nn.Module) -> int:
    """Tokens that the model has an embedding for."""
    find = getattr(model, "get_input_embeddings", None)
    tables = [find()] if find is not None else [each for each in model.modules() if isinstance(each, nn.Embedding)]
    return max((getattr(table, "num_embeddings", 0) for table in tables), default=0)


def _filler(tokenizer: Any, model: nn.Module) -> int:
    """The token for filling up; a classifier that has none is told which, or it could not find a text's end."""
    config: Any = getattr(model, "config", None)
    for candidate in (getattr(tokenizer, "pad_token_id", None), getattr(config, "pad_token_id", None)):
        if isinstance(candidate, int):
            break
    else:
        candidate = 0
    if config is not None:
        config.pad_token_id = candidate
    return candidate
