"""Small models that train in every awkward way there is, random schedules for them, and the plain loop."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from narrowboat.plan.recompute import Kept, Segment
from narrowboat.train.plan import TrainPlan
from narrowboat.train.tape.frames import UnitOption

Context = Callable[[], AbstractContextManager[Any]]


class ResNet(nn.Module):
    """BatchNorm, dropout, ReLU in place, pooling with indices, residual sums."""

    def __init__(self, depth: int = 3, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                nn.Dropout(0.2),
                nn.Conv2d(width, width, 1),
                nn.BatchNorm2d(width, momentum=None),
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(block(x) + x)
        return self.head(x.mean((2, 3)))


class GPT(nn.Module):
    """Causal attention with dropout, and an embedding tied to the head."""

    def __init__(self, depth: int = 2, width: int = 32, words: int = 50, dropout: float = 0.1) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 2 * width, dropout=dropout, batch_first=True, norm_first=True, activation="gelu"
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, words)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        x = self.words(x)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(x)


class Shared(nn.Module):
    """One layer and one norm, four times each."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = x + torch.tanh(self.norm(self.layer(x)))
        return self.head(x)


class Spectral(nn.Module):
    """Power iterations move buffers with each pass; ``normalise`` is one of torch's two forms."""

    def __init__(self, normalise: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Sequential(normalise(nn.Linear(32, 32)), nn.LeakyReLU(0.1, inplace=True)) for _ in range(3)),
            normalise(nn.Linear(32, 10)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Quantised(nn.Module):
    """An observer that is called twice in a pass and moves each time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
        self.quantise = FakeQuantize(MovingAverageMinMaxObserver)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.quantise(self.layers(x))
        x = self.quantise(torch.tanh(x))
        return self.head(self.layers(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(32, 16, 2, batch_first=True, dropout=0.2)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.unflatten(1, (4, 8)).repeat(1, 1, 4))[0][:, -1])


class Norms(nn.Module):
    """GroupNorm, and InstanceNorm with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.SiLU(inplace=True),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
            nn.Hardswish(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.InstanceNorm2d(8, track_running_stats=True),
            nn.AdaptiveMaxPool2d(2),
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).flatten(1))


class InPlace(nn.Module):
    """Activations that overwrite their inputs, sums into the residual, writes into slices."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(4))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for layer, norm in zip(self.layers, self.norms, strict=True):
            y = F.leaky_relu_(layer(norm(x)), 0.2)
            x = x.mul(0.5).add_(y).add_(0.1)
            x[:, :4] = x[:, 4:8] * 2
            x.transpose(0, 1)[3:5].mul_(0.5)
        return self.head(x)


class _Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(x * scale)
        ctx.save_for_backward(x, gate, scale)
        ctx.mark_non_differentiable(gate)
        return x * gate, gate

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        x, gate, scale = ctx.saved_tensors
        slope = gate * (1 - gate)
        return grad * (gate + x * scale * slope), (grad * x * x * slope).sum(0)


class _AddInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        x.add_(y)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (x,) = ctx.saved_tensors
        return grad * x.cos(), grad


class Functions(nn.Module):
    """Custom autograd functions, one of them in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y, gate = _Swish.apply(layer(x), self.scale)
            x = _AddInPlace.apply(y * 2, gate)
        return self.head(x)


class Inner(nn.Module):
    """A model that recomputes by itself."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 32)) for _ in range(4)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = x + (checkpoint(layer, x, use_reentrant=self.reentrant) if number % 2 else layer(x))
        return self.head(x)


class Spectrum(nn.Module):
    """Complex numbers, conjugates, Fourier transforms."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.filter = nn.Parameter(torch.randn(17, dtype=torch.complex64))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            waves = torch.fft.rfft(layer(x)) * self.filter
            both = waves * waves.conj() + torch.view_as_complex(torch.view_as_real(waves).tanh())
            x = torch.tanh(torch.fft.irfft(both, n=32)) + both.abs().sum(1, keepdim=True).log1p() + waves.imag.mean()
        return self.head(x)


class Gathering(nn.Module):
    """Indices: sorting, top-k, gather, scatter, masks of fixed shape, embeddings bags."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.table, self.head = nn.Embedding(16, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = layer(x)
            best, where = y.topk(8, dim=1)
            order = y.argsort(1)
            y = torch.zeros_like(y).scatter_add(1, where, best) + y.gather(1, order).cumsum(1)
            y = y.masked_fill(y > 3, 1.5)
            x = torch.where(y > 0, y, 0.1 * y) + self.table(where % 16).sum(1)
            x = x[:, torch.arange(31, -1, -1)].index_select(1, order[0])
        return self.head(x)


class Counting(nn.Module):
    """Python state that moves with each pass, and what it does to the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.head = nn.Linear(32, 10)
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for layer in self.layers:
            x = torch.sin(layer(x)) * (1 + 0.1 * self.calls) + self.seen
            self.seen += 0.25
        return self.head(x)


def cross_entropy(out: Tensor, target: Tensor) -> Tensor:
    """A mean over all targets, of any shape."""
    return F.cross_entropy(out.flatten(0, -2), target.flatten())


def vectors(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 32, generator=generator), torch.randint(0, 10, (samples,), generator=generator)


def images(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 3, 8, 8, generator=generator), torch.randint(0, 10, (samples,), generator=generator)


def words(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    text = torch.randint(0, 50, (samples, 13), generator=generator)
    return text[:, :-1].clone(), text[:, 1:].clone()


@dataclass(frozen=True)
class Case:
    """A model and its batches.

    Attributes:
        make: a new model; call it after seeding.
        batch: of so many samples.
        samples: enough for saved storages that are worth an option of their own.
        context: in which it trains.
        first_pass_differs: whether the very first pass runs other operators than later ones.
        coupled: whether samples see each other, or random numbers or state make splits differ.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[int, torch.Generator], tuple[Tensor, Tensor]] = vectors
    samples: int = 48
    context: Context = nullcontext
    coupled: bool = False
    first_pass_differs: bool = False

    def model(self) -> nn.Module:
        """Always the same weights."""
        torch.manual_seed(0)
        return self.make().train()

    def batches(self, count: int, samples: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Always the same data."""
        generator = torch.Generator().manual_seed(1)
        return [self.batch(samples or self.samples, generator) for _ in range(count)]


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def mlp() -> nn.Module:
    layers = [nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 32)) for _ in range(3)]
    return nn.Sequential(*layers, nn.Linear(32, 10))


CASES = {
    case.name: case
    for case in (
        Case("mlp", mlp),
        Case("resnet", ResNet, images, 8, coupled=True),
        Case("gpt", GPT, words, 6, coupled=True),
        Case("shared modules", Shared, coupled=True),
        Case("spectral norm", lambda: Spectral(parametrizations.spectral_norm), coupled=True),
        Case("old spectral norm", lambda: Spectral(torch.nn.utils.spectral_norm), coupled=True),
        Case("fake quantisation", Quantised, coupled=True, first_pass_differs=True),
        Case("lstm", Recurrent, coupled=True),
        Case("group and instance norm", Norms, images, 8, coupled=True),
        Case("in place", InPlace),
        Case("custom functions", Functions),
        Case("recomputes by itself", lambda: Inner(False), coupled=True),
        Case("recomputes by itself, reentrant", lambda: Inner(True), coupled=True),
        Case("autocast", lambda: nn.Sequential(mlp(), nn.Dropout(0.1)), context=autocast, coupled=True),
        Case("complex", Spectrum),
        Case("gathering", Gathering, coupled=True),
        Case("counting", Counting, coupled=True),
    )
}


def random_items(
    rng: random.Random, start: int, stop: int, options: Sequence[Sequence[UnitOption]], *, replay: bool = False
) -> tuple[Kept | Segment, ...]:
    """A schedule of the units ``[start, stop)``, nested anyhow; a pass keeps its last unit."""
    items: list[Kept | Segment] = []
    here = start
    while here < stop:
        if here + 1 < stop and rng.random() < 0.5:
            end = rng.randint(here + 1, stop - 1)
            spilled = not replay and rng.random() < 0.5
            items.append(Segment(here, end, random_items(rng, here, end, options, replay=True), spilled))
            here = end
        else:
            choices = [number for number, option in enumerate(options[here]) if not (replay and option.spilled)]
            items.append(Kept(here, rng.choice(choices)))
            here += 1
    return tuple(items)


@dataclass
class Course:
    """What training leaves behind, to be compared bit by bit."""

    losses: list[float] = field(default_factory=list)
    gradients: list[list[Tensor | None]] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    optimizer: list[Tensor] = field(default_factory=list)
    random: tuple[Any, ...] = ()
    attributes: list[Any] = field(default_factory=list)

    def finish(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Course:
        """Take down the model, its plain attributes, the optimizer and the random streams."""
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if optimizer is not None:
            self.optimizer = [
                value.clone()
                for state in optimizer.state.values()
                for value in state.values()
                if isinstance(value, Tensor)
            ]
        self.random = (torch.get_rng_state(), random.getstate())
        self.attributes = [
            {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str))}
            for module in model.modules()
        ]
        return self

    def differences(self, other: Course) -> list[str]:
        """What is not the same; NaNs are not equal to anything."""
        found = [] if self.losses == other.losses else [f"losses {self.losses} and {other.losses}"]
        for step, (mine, theirs) in enumerate(zip(self.gradients, other.gradients, strict=True)):
            for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
                if (a is None) != (b is None) or (a is not None and b is not None and not torch.equal(a, b)):
                    found.append(f"gradient {number} of step {step}")
        found += [name for name, value in self.state.items() if not torch.equal(value, other.state[name])]
        if len(self.optimizer) != len(other.optimizer):
            found.append("optimizer state")
        found += [
            f"optimizer state {number}"
            for number, (a, b) in enumerate(zip(self.optimizer, other.optimizer, strict=False))
            if not torch.equal(a, b)
        ]
        if not torch.equal(self.random[0], other.random[0]) or self.random[1] != other.random[1]:
            found.append("random streams")
        if self.attributes != other.attributes:
            found.append("attributes of modules")
        return found


def gradients(model: nn.Module) -> list[Tensor | None]:
    """Copies, in the order of the parameters."""
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def largest_difference(a: nn.Module, b: nn.Module) -> float:
    """Between parameters and buffers, relative to their size."""
    worst = 0.0
    for (name, left), right in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert left.shape == right.shape, name
        if left.is_floating_point():
            scale = max(float(right.abs().max()), 1e-30) if right.numel() else 1.0
            difference = float((left - right).abs().max()) / scale if right.numel() else 0.0
            worst = math.inf if math.isnan(difference) else max(worst, difference)
    return worst


def copy_of(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def budget_of(plan: TrainPlan, share: float) -> int:
    """The budget that leaves activations so much of what the plain step takes, or the smallest that there is."""
    static = plan.static.total
    return max(static + int((plan.plain_peak - static) * share), plan.min_budget)
