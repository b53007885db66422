"""A linear layer and its cross entropy in chunks, so that the logits are never all in memory.

``torch.nn.functional.linear_cross_entropy`` (torch 2.13) works through the rows in chunks and makes the gradients of
hidden states and weight beside the loss. It is put in where the model's last layer is an ``nn.Linear`` whose output
goes to ``F.cross_entropy`` as it is, or to the loss of Hugging Face's causal language models. While the model runs,
that layer hands its input through; what the loss gets has to be that very tensor.

It rounds otherwise than the two operators, so it is used only where ``"low_memory"`` is among the techniques.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrowboat.errors import TrainingError
from narrowboat.train.loss import call_loss, torch_loss_options
from narrowboat.train.measure.real import untouched
from narrowboat.train.micro_batch import batch_size, copied, rows

log = logging.getLogger("narrowboat")

LEAST_CLASSES = 4096  # below it logits are no larger than other activations
_TRIED = 2  # samples
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _NotApplicableError(Exception):
    """Why the loss is computed as it was given."""


@dataclass(slots=True)
class LowMemoryLoss:
    """Computes the loss of a model without its logits.

    Attributes:
        model: the module itself.
        loss_fn: as it was given; None for a Hugging Face model.
        head: the last layer.
        options: of the cross entropy: ignore_index, reduction, weight, label_smoothing.
    """

    model: nn.Module
    loss_fn: Callable[..., Any] | None
    head: nn.Linear
    options: dict[str, Any]

    @classmethod
    def of(
        cls, model: nn.Module, loss_fn: Callable[..., Any] | None, inputs: Any, targets: Any
    ) -> tuple[LowMemoryLoss | None, str]:
        """For such batches, tried on a few samples; or None and why not. The model stays as it is."""
        try:
            head, options = _of_model(model) if loss_fn is None else _of_function(model, loss_fn)
            made = cls(model, loss_fn, head, options)
            made.check(inputs, targets)
        except _NotApplicableError as reason:
            return None, f"low_memory: {reason}"
        return made, ""

    def check(self, inputs: Any, targets: Any) -> None:
        """Compare loss and gradients with those of the model as it is. Raises _NotApplicableError."""
        if any(torch.is_autocast_enabled(parameter.device.type) for parameter in self.head.parameters()):
            raise _NotApplicableError("not under autocast")
        samples = batch_size(inputs, targets)

        def few() -> list[Any]:
            return [copied(rows(tree, samples, 0, min(samples, _TRIED))) for tree in (inputs, targets)]

        wanted = [parameter for parameter in self.head.parameters() if parameter.requires_grad]
        results = []
        for call in (partial(call_loss, self.model, self.loss_fn), self):
            with untouched(self.model):
                loss = call(*few())
                if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                    raise _NotApplicableError("the loss is no scalar with a graph")
                results.append([loss.detach(), *torch.autograd.grad(loss, wanted)] if wanted else [loss.detach()])
        for ours, theirs in zip(*results, strict=True):
            if not _close(ours, theirs):
                raise _NotApplicableError("on a few samples it gives another loss")

    def __call__(self, inputs: Any, targets: Any) -> Tensor:
        """The loss of a micro-batch, attached.

        Raises:
            TrainingError: what came out of the last layer did not go to the loss as it was.
        """
        with self._without_logits() as hidden:
            if self.loss_fn is None:
                result = call_loss(self.model, None, inputs, targets)
            else:
                result = call_loss(self.model, partial(self._loss, hidden), inputs, targets)
        return result

    @contextmanager
    def _without_logits(self) -> Iterator[list[Tensor]]:
        """The last layer gives its input; the list holds it."""
        hidden: list[Tensor] = []

        def through(x: Tensor) -> Tensor:
            hidden.append(x)
            return x

        before = self.head._compiled_call_impl
        self.head._compiled_call_impl = through
        model: Any = self.model
        own = "_loss_function" in model.__dict__
        old = model.__dict__.get("_loss_function")
        if self.loss_fn is None:
            model._loss_function = partial(self._causal_loss, hidden)
        try:
            yield hidden
        finally:
            self.head._compiled_call_impl = before
            if self.loss_fn is None and own:
                model._loss_function = old
            elif self.loss_fn is None:
                del model._loss_function

    def _loss(self, hidden: list[Tensor], output: Any, target: Tensor, **more: Any) -> Tensor:
        if len(hidden) != 1 or output is not hidden[0]:
            raise _changed()
        if output.dim() > 2 or target.dtype != torch.int64:
            raise _NotApplicableError("the targets are no class numbers for rows of logits")
        return self._chunked(output, target, **{**self.options, **more})

    def _causal_loss(
        self,
        hidden: list[Tensor],
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """As ``transformers.loss.loss_utils.ForCausalLMLoss``, of hidden states."""
        if len(hidden) != 1 or logits is not hidden[0] or vocab_size != self.head.out_features:
            raise _changed()
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        reduction = "mean" if num_items_in_batch is None else "sum"
        states = logits.reshape(-1, logits.shape[-1])
        loss = self._chunked(states, shift_labels.reshape(-1), ignore_index=ignore_index, reduction=reduction)
        return loss if num_items_in_batch is None else loss / num_items_in_batch

    def _chunked(self, states: Tensor, target: Tensor, **options: Any) -> Tensor:
        return F.linear_cross_entropy(
            states,
            self.head.weight,
            target,
            linear_bias=self.head.bias,
            options=nn.LinearCrossEntropyOptions(),
            **options,
        )

    def inside(self, hidden_rows: int) -> int:
        """Bytes that the operator takes inside, beside what it is given and what it returns.

        Args:
            hidden_rows: of the hidden states.
        """
        weight = self.head.weight
        made: Any = nn.LinearCrossEntropyOptions()._adjust(
            num_batches=hidden_rows,
            in_features=self.head.in_features,
            num_classes=self.head.out_features,
            dtype=weight.dtype,
            device=weight.device,
        )
        chunk = made.batch_chunk_size or hidden_rows
        # Logits of one chunk, and a few copies of its hidden states.
        return int(chunk * (self.head.out_features + 4 * self.head.in_features) * (made.acc_dtype or weight.dtype).itemsize)


def _of_function(model: nn.Module, loss_fn: Any) -> tuple[nn.Linear, dict[str, Any]]:
    options = torch_loss_options(loss_fn)
    if options is None or options.get("name") not in ("CrossEntropyLoss", "cross_entropy"):
        raise _NotApplicableError("the loss is not nn.CrossEntropyLoss or F.cross_entropy")
    options = {name: value for name, value in options.items() if name not in ("name", "cross_entropy")}
    if isinstance(loss_fn, nn.CrossEntropyLoss):
        options["label_smoothing"] = loss_fn.label_smoothing
    if options.get("label_smoothing"):
        raise _NotApplicableError("it knows no label smoothing")
    head = None
    for module in model.modules():
        if not any(True for _ in module.children()) and next(module.parameters(recurse=False), None) is not None:
            head = module
    return _usable(head), options


def _of_model(model: Any) -> tuple[nn.Linear, dict[str, Any]]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    try:
        from transformers.loss.loss_utils import ForCausalLMLoss
    except ImportError:
        raise _NotApplicableError("the model computes its loss by itself") from None
    if head is None or getattr(model, "loss_function", None) is not ForCausalLMLoss:
        raise _NotApplicableError("the model's loss is not that of Hugging Face's causal language models")
    return _usable(head), {}


def _usable(head: nn.Module | None) -> nn.Linear:
    if type(head) is not nn.Linear:
        raise _NotApplicableError(f"the last layer is {'unknown' if head is None else 'a ' + type(head).__name__}")
    if head.out_features < LEAST_CLASSES:
        raise _NotApplicableError(f"{head.out_features} logits per row are too few to be worth it")
    if head._compiled_call_impl is not None or any(getattr(head, hooks) for hooks in _HOOKS):
        raise _NotApplicableError("the last layer has hooks, or its weights are on storage")
    if head.weight.is_meta or not head.weight.is_floating_point():
        raise _NotApplicableError("the last layer's weights are on storage")
    return head


def _changed() -> _NotApplicableError:
    return _NotApplicableError("something happens to the logits between the last layer and the loss")


def _close(ours: Tensor, theirs: Tensor) -> bool:
    eps = torch.finfo(theirs.dtype).eps
    return torch.allclose(ours, theirs, rtol=1e4 * eps, atol=256 * eps * float(theirs.abs().max()), equal_nan=True)
