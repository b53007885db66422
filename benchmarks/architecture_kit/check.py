"""Run a model streamed and plain, and compare every output bit for bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import narrowboat as nb
from narrowboat.checkpoint import open_index
from narrowboat.errors import NarrowboatError
from narrowboat.profile import build_skeleton, execution_order

# The two ways without gradients take different paths through the dispatcher, with and without a weight being in.
MODES = {
    "packed": (torch.inference_mode, torch.no_grad, torch.inference_mode),
    "unpacked": (torch.no_grad, torch.inference_mode, torch.no_grad),
}
VARIANTS = ("packed+example", "packed", "unpacked+example", "unpacked")


@dataclass
class Reference:
    """What plain PyTorch computes.

    Attributes:
        passes: by kind of file, flattened outputs of each pass, in the modes of ``MODES``.
        plain: makes the plain model anew.
        generated: flattened result of ``generate``; None if the class cannot, or plain PyTorch fails at it.
    """

    passes: dict[str, list[list[tuple[str, Any]]]]
    plain: Callable[[], nn.Module]
    generated: list[tuple[str, Any]] | None = None

    @property
    def first(self) -> list[tuple[str, Any]]:
        """Outputs of the first pass."""
        return next(iter(self.passes.values()))[0]

    @classmethod
    def of(cls, factory: Callable[[], nn.Module], state: Mapping[str, Any], inputs: dict[str, Any]) -> Reference:
        """Run plain models made anew, as a streamed one is, so that what a model remembers is alike."""
        passes = {kind: run_passes(_plain(factory, state), inputs, modes) for kind, modes in MODES.items()}
        return cls(passes, lambda: _plain(factory, state))


@dataclass
class Outcome:
    """One variant's verdict.

    Attributes:
        verdict: ``exact``, ``refused`` or ``WRONG``.
        detail: the error, or where the outputs part.
        minimum: the budget it ran at, in bytes.
        stats: misses, jumps and traced or not.
    """

    verdict: str
    detail: str = ""
    minimum: int = 0
    stats: dict[str, Any] = field(default_factory=dict)


def flatten(value: Any, path: str = "", depth: int = 0) -> list[tuple[str, Any]]:
    """Every tensor and number within ``value``, with where it stands."""
    if isinstance(value, torch.Tensor):
        return [(path, value.detach().clone())]
    if isinstance(value, (int, float, str, bool)) or value is None:
        return [(path, value)]
    if depth > 8:
        return []
    found: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        for key, item in value.items():
            found += flatten(item, f"{path}.{key}", depth + 1)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            found += flatten(item, f"{path}[{i}]", depth + 1)
    elif type(value).__module__.startswith("transformers") and hasattr(value, "__dict__"):
        for key, item in vars(value).items():
            if isinstance(item, (torch.Tensor, list, tuple, Mapping)):
                found += flatten(item, f"{path}.{key}", depth + 1)
    return found


def difference(expected: list[tuple[str, Any]], got: list[tuple[str, Any]]) -> str:
    """Where two flattened results part; empty if they are the same bits (NaN equals NaN)."""
    if [path for path, _ in expected] != [path for path, _ in got]:
        return f"structure: {len(expected)} values expected, {len(got)} given"
    for (path, a), (_, b) in zip(expected, got, strict=True):
        if isinstance(a, torch.Tensor) != isinstance(b, torch.Tensor):
            return f"{path}: a tensor in one only"
        if not isinstance(a, torch.Tensor):
            if a != b and not (a != a and b != b):
                return f"{path}: {a!r} expected, {b!r} given"
        elif a.dtype != b.dtype or a.shape != b.shape:
            return f"{path}: {a.dtype}{list(a.shape)} expected, {b.dtype}{list(b.shape)} given"
        elif not torch.equal(a, b):
            unequal = (a != b) & ~((a != a) & (b != b))
            if unequal.any():
                part = unequal.double().mean().item()
                size = (
                    (a.double() - b.double()).abs().nan_to_num().max().item() if not a.is_complex() else float("nan")
                )
                return f"{path}: {part:.1%} of {list(a.shape)} differ, by up to {size:.2g}"
    return ""


def _plain(factory: Callable[[], nn.Module], state: Mapping[str, Any]) -> nn.Module:
    model = factory()
    model.load_state_dict(state)
    return model


def run_passes(model: nn.Module, inputs: dict[str, Any], modes: Sequence[Any]) -> list[list[tuple[str, Any]]]:
    """Outputs of one pass in each mode, each from the same random state."""
    results = []
    for mode in modes:
        _seed()
        with mode():
            results.append(flatten(model(**copy.deepcopy(inputs))))
    return results


def run_generate(model: Any, inputs: dict[str, Any]) -> list[tuple[str, Any]]:
    """Five greedy tokens."""
    _seed()
    given = {k: v for k, v in copy.deepcopy(inputs).items() if k not in ("decoder_input_ids", "labels")}
    config = model.config
    if getattr(config, "is_encoder_decoder", False) and model.generation_config.decoder_start_token_id is None:
        given["decoder_start_token_id"] = 0
    with torch.inference_mode():
        return flatten(model.generate(**given, max_new_tokens=5, do_sample=False))


def _seed() -> None:
    torch.manual_seed(11)
    random.seed(11)
    import numpy

    numpy.random.seed(11)


def write_files(model: nn.Module, factory: Callable[[], nn.Module], inputs: Any, folder: Path) -> dict[str, Path]:
    """The model's weights as a safetensors file as others write it, and packed in execution order where traceable."""
    from safetensors.torch import save_file

    state: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        # One name per tensor, as save_pretrained does with tied weights.
        key = tensor.data_ptr() if tensor.numel() else id(tensor)
        if key not in seen:
            seen.add(key)
            state[name] = tensor.detach().contiguous().clone()
    unpacked, packed = folder / "model.safetensors", folder / "packed.safetensors"
    save_file(state, unpacked)
    order = None
    try:
        order = execution_order(factory, open_index(unpacked), inputs)
    except NarrowboatError:
        order = None
    nb.pack(unpacked, packed, order=order)
    return {"packed": packed, "unpacked": unpacked}


def check_variant(
    variant: str,
    factory: Callable[[], nn.Module],
    files: dict[str, Path],
    inputs: dict[str, Any],
    reference: Reference,
    device: Any = "cpu",
) -> Outcome:
    """Stream at the smallest feasible budget and compare with the reference."""
    kind, _, with_example = variant.partition("+")
    example = inputs if with_example else None
    minimum = 0
    streamed: Any = None
    try:
        skeleton = build_skeleton(factory)
        minimum = smallest_budget(skeleton, files[kind], example, device)
        streamed = nb.stream(skeleton, files[kind], budget=minimum, example=example, device=device)
        for number, (mode, expected) in enumerate(zip(MODES[kind], reference.passes[kind], strict=True)):
            found = difference(expected, run_passes(streamed, inputs, (mode,))[0])
            if found:
                # Whose numbers are not the same from run to run?
                again = difference(expected, run_passes(streamed, inputs, (mode,))[0])
                plain = run_passes(reference.plain(), inputs, MODES[kind][: number + 1])[number]
                found += f"; streamed once more: {again or 'exact'}"
                found += f"; plain once more: {difference(expected, plain) or 'exact'}"
                return Outcome("WRONG", f"pass {number + 1}: {found}", minimum, _stats(streamed))
        if reference.generated is not None:
            found = difference(reference.generated, run_generate(streamed, inputs))
            if found:
                return Outcome("WRONG", f"generate: {found}", minimum, _stats(streamed))
        return Outcome("exact", "", minimum, _stats(streamed))
    except TimeoutError:
        raise
    except Exception as error:
        import traceback

        where = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-4:]]
        text = str(error).strip()
        detail = f"{type(error).__name__}: {text[:300]} [{' < '.join(reversed(where))}]"
        return Outcome("refused", detail, minimum, _stats(streamed) if streamed is not None else {})
    finally:
        if streamed is not None:
            nb.session(streamed).close()


def smallest_budget(model: Any, weights: Path, example: Any, device: Any = "cpu") -> int:
    """The smallest budget in bytes, as the refusal of one byte tells it."""
    try:
        nb.stream(model, weights, budget=1, example=example, device=device)
    except nb.BudgetError as error:
        return error.minimum
    raise AssertionError("a budget of one byte was accepted")


def _stats(model: nn.Module) -> dict[str, Any]:
    session = nb.session(model)
    return {
        "misses": session.engine.misses,
        "jumps": session.engine.jumps,
        "blocks": len(session.plan.blocks),
        "resident": len(session.plan.resident),
        "why_untraced": session.prepared.why_untraced,
    }
