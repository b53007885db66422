"""A small network with layers of several kinds, its batches, and optimizers over it in two groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    """Convolution (channels last), batch normalisation, linear layers; one is used twice, one parameter never."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(8)
        self.first = nn.Linear(8 * 36, 48)
        self.twice = nn.Linear(48, 48)
        self.unused = nn.Parameter(torch.ones(7))
        self.head = nn.Linear(48, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(F.relu(self.norm(self.conv(x))).flatten(1)))
        return self.head(torch.tanh(self.twice(torch.tanh(self.twice(x)))))


class Kit:
    """Makes equal networks, optimizers and batches again and again."""

    def net(self) -> Net:
        torch.manual_seed(0)
        return Net()

    def optimizer(self, net: Net, kind: type[torch.optim.Optimizer], **settings: Any) -> torch.optim.Optimizer:
        parameters = list(net.parameters())
        groups = [{"params": parameters[:5], "lr": 0.02}, {"params": parameters[5:], "weight_decay": 0.1}]
        return kind(groups, **settings)

    def loss(self, net: Net, number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(4, 3, 8, 8, generator=generator)
        return F.cross_entropy(net(x), torch.randint(0, 5, (4,), generator=generator))

    def assert_same_state(self, one: dict[str, Any], other: dict[str, Any]) -> None:
        """Two state dicts of optimizers, to the bit and to the stride."""
        assert one["param_groups"] == other["param_groups"]
        assert one["state"].keys() == other["state"].keys()
        for number, state in one["state"].items():
            assert list(state) == list(other["state"][number])
            for key, value in state.items():
                found = other["state"][number][key]
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, found) and value.stride() == found.stride(), (number, key)
                else:
                    assert value == found

    def assert_same_net(self, one: Net, other: Net) -> None:
        want = one.state_dict()
        assert [name for name, value in other.state_dict().items() if not torch.equal(value, want[name])] == []


@pytest.fixture
def kit() -> Iterator[Kit]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Kit()
    torch.set_num_threads(threads)
