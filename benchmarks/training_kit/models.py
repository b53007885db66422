"""What is trained: SAGE's four models and a decoder, with their losses, optimizers and batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from narrowboat import zoo
from narrowboat.zoo.densenet import DenseLayer, Transition
from narrowboat.zoo.resnet import Bottleneck

Batch = tuple[torch.Tensor, torch.Tensor]
Loss = Callable[[Any, torch.Tensor], torch.Tensor]
Optimizers = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

_IMAGE = 112  # a side in pixels; half of the published 224, so that a step takes a second or two on one core
_LENGTH = 128  # tokens
_CLASSES = 1000


@dataclass(frozen=True, slots=True)
class Workload:
    """One model with all that a training step needs.

    Attributes:
        name: its name in the zoo.
        batch: samples of a step, such that it takes one to four seconds on one core.
        data: ``data(batch)`` returns inputs and targets, random but the same in every process.
        loss: the mean over the batch, of the model's output and the targets.
        optimizer: made from the parameters.
        blocks: what static recompute is applied to, one module each.
    """

    name: str
    batch: int
    data: Callable[[int], Batch]
    loss: Loss
    optimizer: Optimizers
    blocks: Callable[[nn.Module], list[nn.Module]]

    def build(self, exact: bool = False) -> nn.Module:
        """The module in training mode, with the same random weights every time.

        Args:
            exact: in float64 and without dropout: gradients of a split batch then differ from the whole one's by
                nothing but rounding. (In float32 a ResNet at its random start magnifies rounding to per cents.)
        """
        torch.manual_seed(0)
        module = zoo.get(self.name)().train()
        if exact:
            module.double()
            for part in module.modules():
                if isinstance(part, nn.Dropout):
                    part.p = 0.0
        return module


def _images(batch: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, 3, _IMAGE, _IMAGE, generator=generator),
        torch.randint(_CLASSES, (batch,), generator=generator),
    )


def _texts(batch: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randint(30_522, (batch, _LENGTH), generator=generator),
        torch.randint(2, (batch,), generator=generator),
    )


def _tokens(batch: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(8192, (batch, _LENGTH + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def _of_text(output: Any, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output.logits, targets)


def _of_tokens(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def _adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    # Fused: the plain one's temporaries, two of the largest parameter's size, would hide BERT's activations.
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def _of_kind(*kinds: type[nn.Module]) -> Callable[[nn.Module], list[nn.Module]]:
    return lambda module: [part for part in module.modules() if isinstance(part, kinds)]


def _children_of(path: str) -> Callable[[nn.Module], list[nn.Module]]:
    return lambda module: list(module.get_submodule(path).children())


# DenseNet's blocks of the paper are too few and too large: its layers are what its own memory-efficient version
# recomputes (Pleiss et al., arXiv:1707.06990).
WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("resnet50", 16, _images, F.cross_entropy, _sgd, _of_kind(Bottleneck)),
        Workload("densenet121", 16, _images, F.cross_entropy, _sgd, _of_kind(DenseLayer, Transition)),
        Workload("mobilenet_v2", 32, _images, F.cross_entropy, _sgd, _children_of("features")),
        Workload("bert_small", 16, _texts, _of_text, _adamw, _children_of("bert.encoder.layer")),
        Workload("gpt12", 8, _tokens, _of_tokens, _adamw, _children_of("blocks")),
    )
}
