"""Load what PyTorch loads late, so that it belongs to the process and not to the model.

The first convolution, matrix product and fake execution of a process bring in kernels, thread pools, packing buffers
and Python modules worth some eighty megabytes, whatever the model. They are loaded once, before the baseline that
budgets are counted from is taken.
"""

from __future__ import annotations

import contextlib
import gc
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from narrowboat.machine.malloc import MallocPolicy, set_malloc_policy
from narrowboat.profile.measure import compute_rates
from narrowboat.profile.use_trace import TraceError, trace_uses


class _Sampler(nn.Module):
    """One of each family of kernels, small."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6(), nn.MaxPool2d(2))
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 32, 1), nn.AdaptiveAvgPool2d(4))
        self.norm = nn.LayerNorm(32)
        self.embed = nn.Embedding(8, 32)
        self.qkv = nn.Linear(32, 96)
        self.head = nn.Linear(32, 8, bias=False)

    def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        x = self.deep(self.stem(image))
        x = F.interpolate(x, scale_factor=2.0).flatten(2).transpose(1, 2)
        x = torch.cat([self.norm(x), self.embed(tokens).expand(x.shape[0], -1, -1)], dim=1)
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.head(F.gelu(x) * F.silu(x) + torch.tanh(x).softmax(-1)).argmax(-1)


def _sample() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    return _Sampler().eval(), (torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, dtype=torch.long))


@cache
def warm_up() -> None:
    """Kernels and thread pools, once per process. Leaves the allocator policy strict; the session chooses."""
    # Nothing of this may leave holes in the heap: a pass would fill them again, on top of the baseline.
    set_malloc_policy(MallocPolicy.STRICT)
    sampler, example = _sample()
    with torch.inference_mode():
        sampler(*example)
        sampler.bfloat16()(example[0].bfloat16(), example[1])  # half precision has kernels and buffers of its own
        F.linear(torch.zeros(128, 1024, dtype=torch.bfloat16), torch.zeros(2048, 1024, dtype=torch.bfloat16))
        # Large enough for every thread to take its packing buffer.
        F.conv2d(torch.zeros(1, 64, 56, 56), torch.zeros(64, 64, 3, 3), padding=1)
        compute_rates(torch.get_num_threads())


@cache
def warm_up_stand_ins() -> None:
    """What PyTorch loads when an operator first meets a tensor with a dispatcher of its own, once per process.

    Its distributed tensors, 41 MiB. The tracer brings them in as well; where a trace is known they may not be needed.
    """

    class _Met(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, *asked: Any) -> Any:
            return torch.empty(0)

    torch.neg(torch.Tensor._make_wrapper_subclass(_Met, (1,)))


@cache
def warm_up_tracer() -> None:
    """The Python modules of fake execution, once per process; costs a second or two. Needed only to trace."""
    sampler, example = _sample()
    # Where fake execution fails here it fails for the model too, and says why there.
    with contextlib.suppress(TraceError):
        trace_uses(sampler, {}, example, {})
    gc.collect()
