"""What the tests of weights on storage share: a small decoder at rest, and what training it in memory gives."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import narrowboat as nb
import pretrained_kit
from narrowboat.profile.pretrained import open_pretrained
from narrowboat.train.lora import add_lora
from narrowboat.train.state.optimizer import StoredOptimizer
from narrowboat.train.weights import TrainingWeights


@dataclass
class Decoder:
    """A llama of some 2 MB: its folder, the plain model, and inputs."""

    folder: Path
    plain: Any
    ids: torch.Tensor
    opened: list[TrainingWeights] = field(default_factory=list)

    @property
    def total(self) -> int:
        return open_pretrained(self.folder).index.total_bytes

    def in_memory(self) -> Any:
        return copy.deepcopy(self.plain).train()

    def skeleton(self) -> Any:
        return open_pretrained(self.folder).model.train()

    def loss(self, model: Any) -> torch.Tensor:
        return model(input_ids=self.ids, labels=self.ids).loss

    def on_storage(self, model: nn.Module, source: Any = None, budget: int = 0, **options: Any) -> TrainingWeights:
        """The model's weights in a window of a quarter of the file, unless told otherwise."""
        source = open_pretrained(self.folder).index if source is None else source
        made = TrainingWeights.of(model, source, budget or self.total // 4, **options)
        self.opened.append(made)
        return made


class Layers(Decoder):
    """The same of linear layers, made without transformers: for child processes, which would import it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, self._made(), torch.arange(12 * 64.0).view(12, 64).sin())
        path = folder / "layers.safetensors"
        if not path.exists():
            nb.pack(self.plain.state_dict(), path)
        self.path = path

    @staticmethod
    def _made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))

    @property
    def total(self) -> int:
        return sum(p.nbytes for p in self.plain.parameters())

    def skeleton(self) -> Any:
        return copy.deepcopy(self.plain).to("meta")

    def loss(self, model: Any) -> torch.Tensor:
        return model(self.ids).square().mean()

    def on_storage(self, model: nn.Module, source: Any = None, budget: int = 0, **options: Any) -> TrainingWeights:
        return super().on_storage(model, source or self.path, budget, **options)


def decoder(folder: Path, **changes: Any) -> Decoder:
    plain = pretrained_kit.llama(folder, **changes)
    generator = torch.Generator().manual_seed(3)
    return Decoder(folder, plain, torch.randint(0, 400, (2, 16), generator=generator))


def gradients_equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have gradients of the same bits, and some."""
    grads = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
    wanted = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    return bool(wanted) and grads.keys() == wanted.keys() and all(torch.equal(grads[n], wanted[n]) for n in wanted)


def with_lora(model: nn.Module) -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(1)
    parameters = add_lora(model, rank=4, dropout=0.1)
    return model, torch.optim.AdamW(parameters, lr=1e-2)


def steps_agree(decoder: Decoder, model: Any, weights: TrainingWeights, optimizer: Any, steps: int = 3) -> bool:
    """Whether that many steps have the gradients and losses of training in memory."""
    plain, plain_optimizer = with_lora(decoder.in_memory())
    same = True
    for step in range(steps):
        losses = []
        weights.begin_step()
        for each in (model, plain):
            torch.manual_seed(step)
            loss = decoder.loss(each)
            loss.backward()
            losses.append(loss.detach())
        same = same and torch.equal(*losses) and gradients_equal(model, plain)
        for each in (optimizer, plain_optimizer):
            each.step()
            each.zero_grad()
        weights.end_step()
    return same


def in_memory_steps(decoder: Decoder, steps: int) -> tuple[Any, list[torch.Tensor]]:
    """The plain model after as many steps of AdamW, and their losses."""
    plain = decoder.in_memory()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = decoder.loss(plain)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return plain, losses


def stored_step(
    decoder: Decoder,
    model: Any,
    weights: TrainingWeights,
    optimizer: StoredOptimizer,
    gradients: dict[nn.Parameter, torch.Tensor],
) -> torch.Tensor:
    """One step with weights and optimizer state on storage; returns its loss."""
    stored = weights.stored
    assert stored is not None
    weights.begin_step()
    loss = decoder.loss(model)
    loss.backward()
    loss = loss.detach()
    optimizer.begin()
    for index, bucket in enumerate(optimizer.buckets):
        with stored.tensors(bucket):
            for parameter in bucket:
                parameter.grad = gradients.pop(parameter)
            optimizer.step_bucket(index)
    optimizer.finish(commit=False)
    stored.commit(stored.records.step + 1)
    optimizer.commit()
    weights.end_step()
    return loss
