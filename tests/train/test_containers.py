"""What a model or a loss collects while it is only measured is not there afterwards."""

from __future__ import annotations

from collections import defaultdict, deque

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import narrowboat as nb
from narrowboat.train.containers import Containers

_SEEN: list[float] = []


class Stats:
    def __init__(self) -> None:
        self.calls = 0
        self.sizes = defaultdict(int)


class Collecting(nn.Module):
    """Keeps histories in every way that a plain module can."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
        self.history: list[torch.Tensor] = []
        self.last: deque[int] = deque(maxlen=3)
        self.stats = Stats()
        self.names: set[str] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        self.history.append(y.detach())
        self.last.append(len(x))
        self.stats.calls += 1
        self.stats.sizes[len(x)] += 1
        self.names.add(f"call {self.stats.calls}")
        return y


def test_prepare_leaves_no_entry_in_lists_of_model_hooks_and_loss() -> None:
    torch.manual_seed(0)
    model, collected = Collecting(), []
    model.body[1].register_forward_hook(lambda module, args, out: collected.append(out.detach()))

    def loss_fn(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        loss = (y - t).square().mean()
        collected.append(loss.detach())
        _SEEN.append(0.0)
        return loss

    step = nb.train_step(model, loss_fn, torch.optim.SGD(model.parameters(), 0.1), budget="64MiB")
    x = torch.randn(8, 32)
    step.prepare(x, x)
    assert (model.history, list(model.last), model.stats.calls, dict(model.stats.sizes)) == ([], [], 0, {})
    assert model.names == set()
    assert collected == [] and _SEEN == []
    step(x, x)
    assert (len(model.history), list(model.last), model.stats.calls) == (1, [8], 1)
    assert (len(collected), len(_SEEN)) == (2, 1)
    assert all(type(each) is torch.Tensor for each in (*model.history, *collected))
    _SEEN.clear()


def test_an_object_reached_twice_and_a_cycle_end_the_walk() -> None:
    loop: list[object] = [1]
    loop.append(loop)
    kept = Containers([loop, loop])
    loop.append(2)
    kept.restore()
    assert len(loop) == 2 and loop[1] is loop


@given(
    st.recursive(
        st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=4),
        max_leaves=20,
    ),
    st.randoms(use_true_random=False),
)
def test_any_nest_of_lists_and_dicts_is_as_it_was(tree, random) -> None:
    import copy

    before = copy.deepcopy(tree)
    kept = Containers([tree])
    stack, reached = [tree], []
    while stack:
        each = stack.pop()
        if isinstance(each, (list, dict)):
            reached.append(each)
            stack.extend(each if isinstance(each, list) else each.values())
    for each in reached:
        if random.random() < 0.5:
            each.clear()
        elif isinstance(each, list):
            each.append(object())
        else:
            each["new"] = object()
    kept.restore()
    assert tree == before
