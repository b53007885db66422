"""What a model keeps on itself: passes that go through it together must not find each other's.

A picture of every module's own attributes is taken before and compared after: attributes set anew, lists, dicts and
sets that changed, tensors written in place. Objects of a class of the model's own are not looked into, nor is what
lives outside the modules (globals, closures).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from narrowboat.arena.slot import Slot, Weight
from narrowboat.arena.standin import is_streamed

_CONTAINERS = (list, dict, set, deque)
_OURS = "_narrowboat"


class Picture:
    """The state that a module and those in it keep, as it is now; holds on to it, so that no identity is reused.

    Args:
        written: weights that a pass in training mode writes to (running statistics).
    """

    def __init__(self, root: nn.Module, written: Iterable[Weight] = ()) -> None:
        self._modules = [(name, module, _own(module)) for name, module in root.named_modules()]
        self._written = [(weight.name, slot, _writes(slot)) for weight in written for slot in weight.slots]

    def change(self) -> str:
        """The first attribute that is no longer what it was, in words; empty if all are."""
        for name, slot, writes in self._written:
            if _writes(slot) != writes:
                return name
        for name, module, before in self._modules:
            if len(module.__dict__) != len(before) + sum(key.startswith(_OURS) for key in module.__dict__):
                return f"the attributes of {name or 'the model'}"
            for key, (value, content) in before.items():
                now = module.__dict__.get(key, self)
                if now is not value or not _same(content, _content(now)):
                    return f"{name}.{key}".lstrip(".")
        return ""

    def restore(self) -> bool:
        """Put attributes and containers back; False if a tensor was written in place, which cannot be undone."""
        for _, module, before in self._modules:
            for key in [k for k in module.__dict__ if k not in before and not k.startswith(_OURS)]:
                del module.__dict__[key]
            for key, (value, content) in before.items():
                module.__dict__[key] = value
                if isinstance(value, _CONTAINERS) and not _same(content, _content(value)):
                    value.clear()
                    _fill(value, content)
        return not self.change()


def _writes(slot: Slot) -> int:
    """How often the weight was written to; -1 while it has not been brought in."""
    return slot.view._version if slot.inside else -1


def _fill(container: Any, content: list[tuple[Any, Any, Any]]) -> None:
    if isinstance(container, dict):
        container.update((key, item) for key, item, _ in content)
    elif isinstance(container, set):
        container.update(item for _, item, _ in content)
    else:
        container.extend(item for _, item, _ in content)


def _own(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    return {key: (value, _content(value)) for key, value in module.__dict__.items() if not key.startswith(_OURS)}


def _content(value: Any) -> Any:
    """What of ``value`` can change while it stays the same object."""
    if isinstance(value, torch.Tensor):
        # A weight's own counter changes as it is swapped; writes to it are seen by the slot.
        return None if is_streamed(value) or value.is_inference() else value._version
    if isinstance(value, dict):
        return [(key, item, _content(item) if isinstance(item, torch.Tensor) else None) for key, item in value.items()]
    if isinstance(value, _CONTAINERS):
        return [(None, item, _content(item) if isinstance(item, torch.Tensor) else None) for item in value]
    return None


def _same(before: Any, after: Any) -> bool:
    if not isinstance(before, list) or not isinstance(after, list):
        return type(before) is type(after) and bool(before == after)
    return len(before) == len(after) and all(
        (k is m or k == m) and a is b and v == w for (k, a, v), (m, b, w) in zip(before, after, strict=True)
    )
