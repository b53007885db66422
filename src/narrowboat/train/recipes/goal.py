"""What a model can learn, seen from what it takes and gives: classes of images, classes of texts, or next tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrowboat.errors import ModelError, NarrowboatError, UsageError
from narrowboat.train.undisturbed import undisturbed

LENGTH = 128  # tokens of a text, unless told


class Kind(StrEnum):
    """What is learned."""

    IMAGES = "classes of images"
    TEXTS = "classes of texts"
    TOKENS = "next tokens"


# By the ends of transformers' class names; a masked language model, say, would see what it is to predict.
_LEARNS = {
    "ForImageClassification": Kind.IMAGES,
    "ForSequenceClassification": Kind.TEXTS,
    "ForCausalLM": Kind.TOKENS,
    "LMHeadModel": Kind.TOKENS,
}


@dataclass(frozen=True, slots=True)
class Goal:
    """How samples become a batch and an output becomes a loss.

    Attributes:
        kind: what is learned.
        shape: of one sample's input: (channels, height, width), or (tokens,).
        outputs: classes, or tokens, that the model tells apart.
        argument: the name under which the model takes its input; "" for the first position.
        dtype: of images.
    """

    kind: Kind
    shape: tuple[int, ...]
    outputs: int
    argument: str = ""
    dtype: torch.dtype = torch.float32

    def collate(self, samples: Sequence[Any]) -> tuple[Any, Tensor]:
        """Inputs and targets of a batch.

        Args:
            samples: pairs of image and class; triples of tokens, mask and class; or rows of tokens, one more than
                the model sees.
        """
        if self.kind is Kind.TOKENS:
            rows = torch.stack(list(samples))
            return self._inputs(rows[:, :-1].contiguous()), rows[:, 1:].contiguous()
        first = torch.stack([sample[0] for sample in samples])
        targets = torch.tensor([sample[-1] for sample in samples])
        if self.kind is Kind.IMAGES:
            return self._inputs(first.to(self.dtype)), targets
        inputs = self._inputs(first)
        if self.argument:
            inputs["attention_mask"] = torch.stack([sample[1] for sample in samples])
        return inputs, targets

    def random_batch(self, batch: int, seed: int = 0) -> tuple[Any, Tensor]:
        """Inputs and targets of ``batch`` samples without meaning, for planning."""
        generator = torch.Generator().manual_seed(seed)

        def numbers(*shape: int) -> Tensor:
            return torch.randint(self.outputs, shape, generator=generator)

        if self.kind is Kind.TOKENS:
            return self.collate(numbers(batch, self.shape[0] + 1))  # type: ignore[arg-type]
        labels = numbers(batch).tolist()
        if self.kind is Kind.TEXTS:
            ones = torch.ones(self.shape, dtype=torch.int64)
            return self.collate([(ones, ones, label) for label in labels])
        images = torch.randn(batch, *self.shape, generator=generator)
        return self.collate(list(zip(images, labels, strict=True)))

    def loss(self, output: Any, targets: Tensor) -> Tensor:
        """Cross entropy, the mean over targets; 0-dim."""
        logits = logits_of(output)
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())

    @torch.no_grad()
    def score(self, model: nn.Module, inputs: Any, targets: Tensor) -> tuple[float, int, int]:
        """Sum of losses, right answers, and answers in all, over a batch."""
        output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
        logits, wanted = logits_of(output).flatten(0, -2), targets.flatten()
        loss = F.cross_entropy(logits, wanted, reduction="sum")
        return float(loss), int((logits.argmax(-1) == wanted).sum()), len(wanted)

    def check_classes(self, classes: int, where: str) -> None:
        """Refuse more classes (or tokens) in the data than the model has outputs.

        Raises:
            UsageError: there are more.
        """
        if classes > self.outputs:
            what = "tokens" if self.kind is Kind.TOKENS else "classes"
            raise UsageError(f"{where} has {classes} {what}, and the model tells {self.outputs} apart")

    def _inputs(self, tensor: Tensor) -> Any:
        return {self.argument: tensor} if self.argument else tensor


def logits_of(output: Any) -> Tensor:
    """The scores in a model's output, float32 or float64.

    Raises:
        ModelError: there are none.
    """
    if isinstance(output, Mapping):
        output = output.get("logits")
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.dim() < 2:
        told = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(output).__name__}"
        raise ModelError(f"the recipe needs scores of classes or tokens; the model gives {told}")
    return found if found.dtype in (torch.float32, torch.float64) else found.float()


def find_goal(
    spec: str,
    model: nn.Module,
    example: tuple[Any, ...] | None,
    *,
    text: bool | None,
    size: int | None = None,
    length: int | None = None,
    native: tuple[int, int, int] | None = None,
) -> Goal:
    """What ``model`` can learn from text (or images), by a pass on one sample.

    Args:
        spec: the model's name in errors.
        model: is left as it is.
        example: positional arguments of a pass; None where there is no example.
        text: the data is text, or images; None where there is no data.
        size: height and width of images; the example's without it.
        length: tokens of a text; ``LENGTH`` without it.
        native: the shape of the data's images, where there is neither ``size`` nor an example.

    Raises:
        UsageError: the model takes images and the data is text, or the other way round; options that do not fit.
        ModelError: the model does not run on such samples, or gives no scores.
    """
    argument, learns = _transformers(spec, model)
    first = example[0] if example and isinstance(example[0], Tensor) else None
    takes_text = text
    if first is not None:
        takes_text = not first.is_floating_point()
    elif learns is not None:
        takes_text = learns is not Kind.IMAGES
    if takes_text is None:
        raise UsageError(f"{spec} has no example_inputs(): say with --size or --length what it takes")
    if text is not None and text != takes_text:
        takes = "token numbers" if takes_text else "images"
        raise UsageError(f"{spec} takes {takes}, and the data is {'text' if text else 'images'}")
    if (size if takes_text else length) is not None:
        raise UsageError("--length is for models that take text, --size for those that take images")
    dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
    shape = (length or LENGTH,) if takes_text else _image_shape(spec, first, size, native)
    sample = torch.zeros(1, *shape, dtype=torch.int64 if takes_text else dtype)
    logits = _probe(spec, model, {argument: sample} if argument else sample)
    kind = learns or _kind(spec, takes_text, logits)
    return Goal(kind, shape, logits.shape[-1], argument, dtype)


def _transformers(spec: str, model: nn.Module) -> tuple[str, Kind | None]:
    """The name of a transformers model's input and what the model learns; ("", None) for any other module."""
    argument = getattr(model, "main_input_name", None)
    if not isinstance(argument, str) or not hasattr(model, "config"):
        return "", None
    name = type(model).__name__
    for end, kind in _LEARNS.items():
        if name.endswith(end):
            return argument, kind
    raise ModelError(f"{spec} is a {name}: the recipe trains {', '.join(f'*{end}' for end in _LEARNS)}")


def _image_shape(
    spec: str, first: Tensor | None, size: int | None, native: tuple[int, int, int] | None
) -> tuple[int, int, int]:
    if first is not None and first.dim() != 4:
        raise UsageError(f"{spec} takes a tensor of {first.dim()} dimensions, and an image batch has 4")
    if first is not None:
        channels, height, width = first.shape[1:]
    elif native is not None:
        channels, height, width = native
    elif size is not None:
        channels = 3
    else:
        raise UsageError(f"{spec} has no example_inputs(): give --size, the height and width of its images")
    return (channels, size, size) if size is not None else (channels, height, width)


def _probe(spec: str, model: nn.Module, inputs: Any) -> Tensor:
    try:
        with undisturbed(model), torch.no_grad():
            model.eval()
            return logits_of(model(**inputs) if isinstance(inputs, Mapping) else model(inputs))
    except NarrowboatError as error:
        raise ModelError(f"{spec}: {error}") from error
    except Exception as error:
        told = " ".join(str(error).split())[:300]
        shape = list((next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs).shape)
        raise ModelError(f"{spec} does not run on inputs of shape {shape}: {type(error).__name__}: {told}") from error


def _kind(spec: str, text: bool, logits: Tensor) -> Kind:
    wanted = {(False, 2): Kind.IMAGES, (True, 2): Kind.TEXTS, (True, 3): Kind.TOKENS}
    if (text, logits.dim()) not in wanted:
        raise ModelError(f"{spec} gives scores of shape {list(logits.shape)} for one sample, and not one row of them")
    return wanted[(text, logits.dim())]
