"""MODEL as a folder used for text: ``text:FOLDER?window=64`` and ``embed:FOLDER?window=128``."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from narrowboat.errors import ModelError
from narrowboat.zoo.folder import FolderModel
from narrowboat.zoo.text_facts import SentenceForm, TextSpec, sentence_form

if TYPE_CHECKING:
    from torch import nn


class TextModel(FolderModel):
    """A factory over a model folder whose modules take one window of tokens, and give one row.

    The network is computed over the whole window for each token: a task keeps no state between its jobs, so there is
    no cache of keys and values. Its weights have the folder's names.

    Args:
        spec: of the folder, what is wanted of it, and the window.
    """

    def __init__(self, spec: TextSpec) -> None:
        super().__init__(spec.folder.expanduser())
        self.spec = spec
        self.name = self.__qualname__ = str(spec)

    def __call__(self) -> nn.Module:
        """The module, in eval mode, its parameters without storage.

        Raises:
            ModelError: the folder's model does not do that, or not over so many tokens.
        """
        model: Any = super().__call__()
        self._check(model)
        from narrowboat.zoo.text_heads import give_embedding, give_last_logits

        if self.spec.kind == "causal":
            give_last_logits(model)
        else:
            give_embedding(model, self._form)
        return model

    @cached_property
    def _form(self) -> SentenceForm:
        return sentence_form(self.folder)

    def example_inputs(self, batch: int = 1) -> tuple[Any, ...]:
        """The positional arguments of a pass over a full window.

        Raises:
            ModelError: more than one row was asked for.
        """
        import torch

        if batch != 1:
            raise ModelError(f"{self.spec} computes one row at a time, not {batch}")
        tokens = torch.zeros(1, self.spec.window, dtype=torch.int64)
        if self.spec.kind == "causal":
            return tokens, torch.tensor([self.spec.window - 1])
        return tokens, torch.ones_like(tokens)

    def _check(self, model: Any) -> None:
        from narrowboat.profile.pretrained import positions
        from narrowboat.zoo.text_heads import is_causal

        what, config, window = type(model).__name__, model.config, self.spec.window
        if getattr(config, "is_encoder_decoder", False) or getattr(model, "main_input_name", "") != "input_ids":
            raise ModelError(f"{self.folder}: {what} does not take tokens alone")
        if self.spec.kind == "causal" and (model.get_output_embeddings() is None or not model.can_generate()):
            raise ModelError(f"{self.folder}: {what} is no causal language model: try embed:{self.folder}?window=...")
        most = positions(config)
        first = _first_position(model)
        if window > most - first:
            raise ModelError(f"{self.folder}: a window of {window} tokens, and {what} has {most - first} positions")
        near = getattr(config, "sliding_window", None) or getattr(config, "local_attention", None)
        if self.spec.kind == "embedding" and not is_causal(model) and isinstance(near, int) and window > near // 2:
            raise ModelError(
                f"{self.folder}: {what} attends to {near // 2} tokens on each side in some layers; "
                f"a window of more, such as {window}, is not supported"
            )


def _first_position(model: Any) -> int:
    """The number of the first token's position: RoBERTa and its kin count from behind the padding's."""
    for name, child in model.named_modules():
        if name.endswith("position_embeddings") and getattr(child, "padding_idx", None) is not None:
            return int(child.padding_idx) + 1
    return 0
