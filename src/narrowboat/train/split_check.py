"""Whether gradients of micro-batches sum to those of the batch: tried on a few samples before it is relied on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from narrowboat.errors import LossError
from narrowboat.train.loss import LossPlan, call_loss
from narrowboat.train.loss_trace import Call
from narrowboat.train.micro_batch import batch_size, cut, has_rows, mapped
from narrowboat.train.sample_marks import marks, spread
from narrowboat.train.undisturbed import undisturbed

# Relative error of the whole gradient that rounding explains. A model in float64 may still compute parts of itself in
# float32 (Hugging Face's losses and RMSNorm do).
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
_HALF = 5e-2
_BUCKETS = 4096  # numbers that stand for the gradient of one parameter
_CHUNK = 1 << 18  # entries at a time; a multiple of the buckets


@dataclass(frozen=True)
class SplitVerdict:
    """Whether a batch may be split.

    Attributes:
        kind: ``"additive"``: yes. ``"coupled"``: never, the parts' weighted gradients are not those of the whole.
            ``"unknown"``: it could not be told, so better not.
        reason: one line.
        error: largest relative error found between summed and whole gradient; None if nothing could be compared.
        moving: buffers that change with every forward pass: with K micro-batches they move K times.
    """

    kind: Literal["additive", "coupled", "unknown"]
    reason: str
    error: float | None = None
    moving: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.kind == "additive"


def check_splits(
    model: nn.Module,
    loss_fn: Callable[..., Any] | None,
    inputs: Any,
    targets: Any,
    plan: LossPlan,
    *,
    call: Call = call_loss,
    samples: int = 4,
    copy_limit: int = 64 << 20,
    features: Sequence[int] = (),
) -> SplitVerdict:
    """Compare the gradient of a few samples with the weighted sum over their parts, equal and unequal (1 + the rest).

    Done on a float64 copy of the model where that is small enough, else on the model itself in its own precision.
    Dropout is off and BatchNorm uses running statistics (what it does to a split batch is another question: see
    :mod:`narrowboat.train.batch_statistics`); where the rest is still random, eval mode is tried. Gradients in
    ``.grad``, buffers, modes and random streams are left as they were.

    Args:
        model, loss_fn, inputs, targets, call: as for :func:`narrowboat.train.loss_trace.plan_loss`.
        plan: the weights to try.
        samples: how many of the batch to use, chosen to differ in padding, masks, lengths and weights.
        copy_limit: bytes that the float64 copy may take.
        features: of ``sample_marks`` that they should differ in before others.

    Raises:
        LossError: the loss is not a scalar.
    """
    if batch_size(inputs, targets) < 2:
        return SplitVerdict("unknown", "a batch of one sample says nothing about splitting")
    inputs, targets = _few(inputs, targets, spread(marks(inputs, targets), samples, features))
    reason = ""
    for subject in _subjects(model, loss_fn, inputs, targets, copy_limit):
        trial = _Trial(*subject, plan, call)
        try:
            with undisturbed(*trial.modules), torch.enable_grad(), trial.precision():
                return trial.verdict()
        except LossError:
            raise
        except Exception as error:  # whatever the model does not take: float64, a batch of one
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return SplitVerdict("unknown", f"no trial of the split got through ({reason})")


@dataclass(frozen=True)
class _Trial:
    """One model, one precision, a few samples."""

    model: nn.Module
    loss_fn: Any
    inputs: Any
    targets: Any
    plan: LossPlan
    call: Call

    @property
    def modules(self) -> list[nn.Module]:
        return [module for module in (self.model, self.loss_fn) if isinstance(module, nn.Module)]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in nn.ModuleList(self.modules).parameters() if p.requires_grad]

    @property
    def exact(self) -> bool:
        return all(p.dtype == torch.float64 for p in self.parameters)

    @contextmanager
    def precision(self) -> Iterator[None]:
        """No autocast for a float64 copy: the parts of it that are float32 would become half."""
        with ExitStack() as stack:
            for device in {p.device.type for p in self.parameters if self.exact}:
                stack.enter_context(torch.autocast(device, enabled=False))
            yield

    def verdict(self) -> SplitVerdict:
        quiet_modes: tuple[Callable[[nn.Module], Any], ...] = (_without_batch_noise, nn.Module.eval)
        for quieten in quiet_modes:
            for module in self.modules:
                quieten(module)
            with _lent_statistics(self.modules):
                verdict = self._compare() if self.parameters else SplitVerdict("unknown", "no parameter is trained")
            if verdict is not None:
                return verdict
        return SplitVerdict("unknown", "the loss is random even with dropout off")

    def _compare(self) -> SplitVerdict | None:
        """None if two passes over the same samples differ, which leaves nothing to compare."""
        buffers = self._buffers()
        size = batch_size(self.inputs, self.targets)
        (whole,) = self._gradients([size])
        moving = tuple(name for name, value in self._buffers().items() if not _same(value, buffers.get(name)))
        self._put_back(buffers)
        (again,) = self._gradients([size])
        bound = self._tolerance()
        if not torch.isfinite(whole).all():
            return SplitVerdict("unknown", "the gradient of the sample is not finite", moving=moving)
        if not whole.any():
            return SplitVerdict("unknown", "the gradient of the sample is zero", moving=moving)
        if _error(whole, [again]) > bound:
            return None
        worst, failed, held_error = 0.0, None, 0.0
        for sizes in dict.fromkeys([(size - size // 2, size // 2), (1, size - 1)]):
            self._put_back(buffers)
            parts = self._gradients(sizes)
            error = _error(whole, parts)
            # A part without a single sample that counts is NaN, and NaN is larger than nothing.
            error = error if math.isfinite(error) else math.inf
            if error > worst:
                worst, failed = error, (parts, sizes)
            held = self._gradients(sizes, held=buffers) if moving else parts
            now = _error(whole, held)
            held_error = max(held_error, now if math.isfinite(now) else math.inf)
        if worst <= bound:
            return SplitVerdict(
                "additive", f"{self.plan.why}; parts sum to the whole within {worst:.0e}", worst, moving
            )
        if held_error <= bound:
            why = f"{', '.join(moving[:3])} moves with every forward pass, and the next micro-batch sees it moved"
            return SplitVerdict("coupled", why, worst, moving)
        assert failed is not None
        return SplitVerdict("coupled", self._why_coupled(whole, *failed, bound), worst, moving)

    def _gradients(self, sizes: Sequence[int], held: dict[str, Tensor] | None = None) -> list[Tensor]:
        """A sketch of one weighted gradient per part, in float64."""
        pieces = cut(self.inputs, self.targets, list(sizes))
        found: list[Tensor] = []
        counts: list[Tensor | float] = []
        for (inputs, targets), weight in zip(pieces, self.plan.weights(pieces), strict=True):
            if held is not None:
                self._put_back(held)
            loss, count = self.plan.weighted(self.call(self.model, self.loss_fn, inputs, targets), weight)
            counts.append(count)
            found.append(self._flat(loss))
        factor = self.plan.correction(sum(sizes), counts)
        return [gradient * factor for gradient in found]

    def _flat(self, loss: Tensor) -> Tensor:
        parameters = self.parameters
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        sketches = []
        for place, (gradient, parameter) in enumerate(zip(gradients, parameters, strict=True)):
            if gradient is None:
                sketches.append(torch.zeros(min(parameter.numel(), _BUCKETS), dtype=torch.float64))
            else:
                sketches.append(_sketch(gradient.detach(), place))
        return torch.cat(sketches)

    def _tolerance(self) -> float:
        if not self.exact and any(torch.is_autocast_enabled(p.device.type) for p in self.parameters):
            return _HALF
        return max(_TOLERANCE.get(p.dtype, _HALF) for p in self.parameters)

    def _buffers(self) -> dict[str, Tensor]:
        named = nn.ModuleList(self.modules).named_buffers()
        return {name.split(".", 1)[1]: buffer.detach().clone() for name, buffer in named}

    def _put_back(self, buffers: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, buffer in nn.ModuleList(self.modules).named_buffers():
                buffer.copy_(buffers[name.split(".", 1)[1]])

    def _why_coupled(self, whole: Tensor, parts: list[Tensor], sizes: Sequence[int], bound: float) -> str:
        """Either the weights are wrong, which a count can mend, or no weights would do."""
        matrix = torch.stack(parts, dim=1)
        if not torch.isfinite(matrix).all():
            return "a part of a few samples has no finite loss of its own: say with count= what the loss averages over"
        factors = torch.linalg.lstsq(matrix, whole.unsqueeze(1)).solution.squeeze(1)
        if _error(whole, list((matrix * factors).unbind(1))) <= bound:
            told = ", ".join(f"{factor:.3g}" for factor in factors.tolist())
            return (
                f"parts of {' and '.join(map(str, sizes))} samples sum to the whole only after {told} times their "
                f"weights ({self.plan.why}): say with count= what the loss averages over"
            )
        return "the loss of a sample depends on the other samples of its batch (no weights make the parts add up)"


def _subjects(
    model: nn.Module, loss_fn: Any, inputs: Any, targets: Any, copy_limit: int
) -> Iterator[tuple[nn.Module, Any, Any, Any]]:
    """Model, loss, inputs and targets to try: a float64 copy if it is small enough, then they themselves."""
    modules = nn.ModuleList([m for m in (model, loss_fn) if isinstance(m, nn.Module)])
    values = sum(t.numel() for t in (*modules.parameters(), *modules.buffers()) if t.is_floating_point())
    if values * torch.float64.itemsize <= copy_limit:
        try:
            twin, twin_loss = copy.deepcopy((model, loss_fn))  # together, for what they share
            for module in (twin, twin_loss):
                if isinstance(module, nn.Module):
                    module.double()
        except Exception:  # a model that cannot be copied is tried as it is
            pass
        else:
            double = mapped(lambda t: t.detach().double() if t.is_floating_point() else t, (inputs, targets))
            yield twin, twin_loss, *double
    yield model, loss_fn, inputs, targets


def _few(inputs: Any, targets: Any, chosen: list[int]) -> tuple[Any, Any]:
    size, places = batch_size(inputs, targets), torch.tensor(chosen)
    few = mapped(lambda t: t[places.to(t.device)] if has_rows(t, size) else t, (inputs, targets))
    return few[0], few[1]


def _without_batch_noise(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, (_DropoutNd, _BatchNorm)):
            child.training = False


@contextmanager
def _lent_statistics(modules: Sequence[nn.Module]) -> Iterator[None]:
    """BatchNorm without running statistics gets some, or it would couple the samples in eval mode too."""
    bare = [m for root in modules for m in root.modules() if isinstance(m, _BatchNorm) and m.running_mean is None]
    for module in bare:
        like = next(nn.ModuleList(modules).parameters())
        module.running_mean, module.running_var = (like.new_full((module.num_features,), v) for v in (0.0, 1.0))
    try:
        yield
    finally:
        for module in bare:
            module.running_mean = module.running_var = None


def _sketch(gradient: Tensor, seed: int) -> Tensor:
    """A gradient in at most ``_BUCKETS`` numbers: sums of its entries with random signs, the same in every call.

    Linear, so gradients that add up have sketches that do, and one that is off by some share is off by about that
    share (count sketch; Charikar, Chen and Farach-Colton, 2002). Whole gradients, several at once in float64, would
    take twenty times the weights.
    """
    flat = (gradient.to_dense() if gradient.is_sparse else gradient).reshape(-1)
    if flat.numel() <= _BUCKETS:
        return flat.double().cpu()
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(_BUCKETS, dtype=torch.float64)
    for chunk in flat.split(_CHUNK):
        signs = torch.randint(2, (len(chunk),), generator=generator, dtype=torch.int8)
        signed = chunk.double().cpu() * (2 * signs - 1)
        rest = -len(chunk) % _BUCKETS
        found += torch.nn.functional.pad(signed, (0, rest)).view(-1, _BUCKETS).sum(0)
    return found


def _error(whole: Tensor, parts: Sequence[Tensor]) -> float:
    """Norm of the difference over the norms of what was added, so that parts that cancel are judged fairly."""
    total = torch.stack(list(parts)).sum(0)
    scale = max(float(whole.norm()), sum(float(part.norm()) for part in parts))
    return float((total - whole).norm()) / max(scale, torch.finfo(torch.float64).tiny)


def _same(value: Tensor, other: Tensor | None) -> bool:
    return other is not None and value.shape == other.shape and bool(torch.equal(value, other))
