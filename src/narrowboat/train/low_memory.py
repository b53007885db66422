"""A linear layer and its cross entropy in chunks, so that the logits are never all in memory.

``torch.nn.functional.linear_cross_entropy`` (torch 2.13) works through the rows in chunks and makes the gradients of
hidden states and weight beside the loss. It is put in where the model's last layer is an ``nn.Linear`` whose output
goes to ``F.cross_entropy`` as it is, or to the loss of Hugging Face's causal language models. While the model runs,
that layer hands its input through; what the loss gets has to be that very tensor.

It rounds otherwise than the two operators, so it is used only where ``"low_memory"`` is among the techniques.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrowboat.errors import TrainingError
from narrowboat.train.loss import call_loss
from narrowboat.train.measure.real import untouched
from narrowboat.train.micro_batch import batch_size, copied, rows

LEAST_CLASSES = 4096  # below it logits are no larger than other activations
_TRIED = 2  # samples
_CHUNK = 4 << 20  # bytes of logits
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


_NOTHING = object()


class _NotApplicableError(TrainingError):
    """Why the loss is to be computed as it was given."""


@dataclass(slots=True)
class LowMemoryLoss:
    """Computes the loss of a model without its logits.

    Attributes:
        model: the module itself.
        loss_fn: as it was given; None for a Hugging Face model.
        head: the last layer.
        options: of the cross entropy: ignore_index, reduction, weight.
        rows: of hidden states that one sample gives; known after ``check``.
    """

    model: nn.Module
    loss_fn: Callable[..., Any] | None
    head: nn.Linear
    options: dict[str, Any]
    rows: int = 1

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
            return None, str(reason)
        except Exception as error:  # a model may do anything with what it takes for logits
            return None, f"low_memory: the model does not run without its logits ({type(error).__name__})"
        return made, ""

    def check(self, inputs: Any, targets: Any) -> None:
        """Compare loss and gradients with those of the model as it is. Raises _NotApplicableError."""
        if any(torch.is_autocast_enabled(parameter.device.type) for parameter in self.head.parameters()):
            raise _not("not under autocast")
        samples = batch_size(inputs, targets)

        def few() -> list[Any]:
            return [copied(rows(tree, samples, 0, min(samples, _TRIED))) for tree in (inputs, targets)]

        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        wanted = [*trained[:1], *(parameter for parameter in self.head.parameters() if parameter.requires_grad)]
        results = []
        for call in (partial(call_loss, self.model, self.loss_fn), self):
            with untouched(self.model):
                loss = call(*few())
                if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                    raise _not("the loss is no scalar with a graph")
                results.append([loss.detach(), *torch.autograd.grad(loss, wanted)])
        for ours, theirs in zip(*results, strict=True):
            if not _close(ours, theirs):
                raise _not("on a few samples it gives another loss")

    def __call__(self, inputs: Any, targets: Any) -> Tensor:
        """The loss of a micro-batch, attached.

        Raises:
            TrainingError: what came out of the last layer did not go to the loss as it was.
        """
        with self._without_logits() as hidden:
            loss_fn = None if self.loss_fn is None else partial(self._loss, hidden)
            loss: Tensor = call_loss(self.model, loss_fn, inputs, targets)
        return loss

    @contextmanager
    def _without_logits(self) -> Iterator[list[Tensor]]:
        """The last layer gives its input; the list holds it."""
        hidden: list[Tensor] = []

        def through(x: Tensor) -> Tensor:
            hidden.append(x)
            return x

        # Where ``nn.Module.compile`` puts its callable; ``loss_function`` of Hugging Face's models looks there.
        places: list[tuple[dict[str, Any], str, Any]] = [(self.head.__dict__, "_compiled_call_impl", through)]
        if self.loss_fn is None:
            places.append((self.model.__dict__, "_loss_function", partial(self._causal_loss, hidden)))
        before = [table.get(name, _NOTHING) for table, name, _ in places]
        for table, name, value in places:
            table[name] = value
        try:
            yield hidden
        finally:
            for (table, name, _), old in zip(places, before, strict=True):
                table.pop(name, None)
                if old is not _NOTHING:
                    table[name] = old

    def _loss(self, hidden: list[Tensor], output: Any, target: Tensor) -> Tensor:
        if len(hidden) != 1 or output is not hidden[0]:
            raise _changed()
        self.rows = max(1, output.numel() // output.shape[-1] // max(1, target.shape[0] if target.dim() else 1))
        if output.dim() > 2 or target.dtype != torch.int64:
            raise _not("the targets are no class numbers for rows of logits")
        return self._chunked(output, target, **self.options)

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
        self.rows = max(1, states.shape[0] // labels.shape[0])
        loss = self._chunked(states, shift_labels.reshape(-1), ignore_index=ignore_index, reduction=reduction)
        return loss if num_items_in_batch is None else loss / num_items_in_batch

    def _chunked(self, states: Tensor, target: Tensor, **options: Any) -> Tensor:
        return F.linear_cross_entropy(
            states,
            self.head.weight,
            target,
            linear_bias=self.head.bias,
            options=nn.LinearCrossEntropyOptions(batch_chunk_size=self._chunk(states.shape[0]), chunking_method=None),
            **options,
        )

    def inside(self, samples: int) -> int:
        """Bytes that the operator takes inside, beside what it is given and what it returns."""
        weight, states = self.head.weight, samples * self.rows
        # Logits of one chunk and a few copies of its hidden states; for sums in another dtype also the weight in it,
        # and its gradient.
        entries = self._chunk(states) * (self.head.out_features + 4 * self.head.in_features)
        return _sum_bytes(weight) * (entries + (2 * weight.numel() if _sum_bytes(weight) != weight.itemsize else 0))

    def _chunk(self, states: int) -> int:
        """Rows in a chunk: its logits take half of what all hidden states take, or what makes products efficient."""
        room = max(_CHUNK, states * self.head.in_features * self.head.weight.itemsize // 2)
        return max(1, min(states, room // (self.head.out_features * _sum_bytes(self.head.weight))))


def _sum_bytes(weight: Tensor) -> int:
    """Bytes of a number in the operator's sums: half precision is summed in float32."""
    return max(4, weight.itemsize)


def _of_function(model: nn.Module, loss_fn: Any) -> tuple[nn.Linear, dict[str, Any]]:
    options = _options(loss_fn)
    if options.pop("label_smoothing", 0.0):
        raise _not("torch's operator knows no label smoothing")
    if options.get("reduction", "mean") not in ("mean", "sum"):
        raise _not("the loss is not reduced to a scalar")
    head = None
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            head = module
    return _usable(head), options


def _options(loss_fn: Any) -> dict[str, Any]:
    if type(loss_fn) is nn.CrossEntropyLoss:
        return {name: getattr(loss_fn, name) for name in ("weight", "reduction", "ignore_index", "label_smoothing")}
    keywords: dict[str, Any] = {}
    while isinstance(loss_fn, partial) and not loss_fn.args:
        keywords, loss_fn = {**loss_fn.keywords, **keywords}, loss_fn.func
    if loss_fn is not F.cross_entropy or not {"size_average", "reduce"}.isdisjoint(keywords):
        raise _not("the loss is not nn.CrossEntropyLoss or F.cross_entropy")
    return keywords


def _of_model(model: Any) -> tuple[nn.Linear, dict[str, Any]]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    try:
        from transformers.loss.loss_utils import ForCausalLMLoss
    except ImportError:
        raise _not("the model computes its loss by itself") from None
    if head is None or getattr(model, "loss_function", None) is not ForCausalLMLoss:
        raise _not("the model's loss is not that of Hugging Face's causal language models")
    return _usable(head), {}


def _usable(head: nn.Module | None) -> nn.Linear:
    if type(head) is not nn.Linear:
        raise _not(f"the last layer is {'unknown' if head is None else 'a ' + type(head).__name__}")
    if head.out_features < LEAST_CLASSES:
        raise _not(f"{head.out_features} logits per row are too few to be worth it")
    if head._compiled_call_impl is not None or any(getattr(head, hooks) for hooks in _HOOKS):
        raise _not("the last layer has hooks, or its weights are on storage")
    if head.weight.is_meta or not head.weight.is_floating_point():
        raise _not("the last layer's weights are on storage")
    return head


def _not(reason: str) -> _NotApplicableError:
    return _NotApplicableError(f"low_memory: {reason}")


def _changed() -> _NotApplicableError:
    return _not("something happens to the logits between the last layer and the loss")


def _close(ours: Tensor, theirs: Tensor) -> bool:
    eps = torch.finfo(theirs.dtype).eps
    return torch.allclose(ours, theirs, rtol=1e4 * eps, atol=256 * eps * float(theirs.abs().max()), equal_nan=True)
