"""Weights in memory: the slab's bytes, the objects through which a model sees them, and what stands in for them."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from narrowboat.arena.slab import Slab
from narrowboat.arena.slot import Slot, Weight
from narrowboat.arena.standin import is_standin
from narrowboat.checkpoint import TensorEntry
from narrowboat.errors import StreamedModelError

PAGE = 4096


class Owner:
    """Brings a weight in for an operator by showing its slot, as the session's engine does."""

    def __init__(self) -> None:
        self.touched: list[str] = []

    @contextmanager
    def touching(self, weights: list[Weight]) -> Iterator[Any]:
        self.touched += [weight.name for weight in weights]
        yield lambda slot: slot.view


def make_slot(tensor: torch.Tensor, slab: Slab, offset: int = 0) -> Slot:
    entry = TensorEntry("w", tensor.dtype, tuple(tensor.shape), tensor.nbytes, Path("w"), 0)
    weight = Weight(0, "layer.weight", entry)
    weight.owner = Owner()
    slot = Slot(weight, tensor)
    weight.slots.append(slot)
    slot.bind(slab.tensor(offset, entry.dtype, entry.shape))
    return slot


@pytest.fixture
def slab() -> Slab:
    return Slab(4 * PAGE)


@pytest.fixture
def parameter() -> nn.Parameter:
    return nn.Parameter(torch.arange(64.0).view(8, 8))


RSS_CHILD = """
import sys, torch
from narrowboat.arena.slab import Slab
from narrowboat.machine.memory import process_memory
rss = lambda: process_memory().rss >> 20
start = rss()
slab = Slab(64 << 20, populate=sys.argv[1] == "now")
if sys.argv[1] == "behind":
    slab.hold([(0, 64 << 20)], behind=True)
    slab.finish_populating()
populated = rss() - start
tensor = slab.tensor(0, torch.float32, (1024, 1024))
tensor.fill_(7.0)
slab.close()
kept = rss() - start
value = tensor[5, 5].item()
del tensor
print(populated, kept, rss() - start, value)
"""


@pytest.mark.parametrize("when", ["now", "behind"])
def test_a_slab_is_populated_and_given_back_with_its_last_tensor(when: str) -> None:
    child = subprocess.run([sys.executable, "-c", RSS_CHILD, when], capture_output=True, text=True, check=True)
    populated, kept, left, value = child.stdout.split()
    assert int(populated) >= 63
    assert int(kept) >= 60
    assert int(left) <= 3
    assert float(value) == 7.0


@pytest.mark.parametrize("nbytes", [1, PAGE, PAGE + 1, 3 << 20])
def test_a_slab_is_whole_zeroed_pages_at_a_page_boundary(nbytes: int) -> None:
    slab = Slab(nbytes)
    assert slab.nbytes == -(-nbytes // PAGE) * PAGE
    assert slab.address % PAGE == 0
    assert bytes(slab.bytes_at(0, slab.nbytes)) == bytes(slab.nbytes)
    slab.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool])
def test_tensors_are_views_of_the_slabs_bytes_at_aligned_addresses(slab: Slab, dtype: torch.dtype) -> None:
    for offset in (0, 64, 4096 + 192):
        tensor = slab.tensor(offset, dtype, (3, 5))
        assert tensor.data_ptr() == slab.address + offset
        assert tensor.data_ptr() % 64 == 0
        assert tensor.is_contiguous()
        assert not tensor.is_inference()
    tensor = slab.tensor(128, torch.uint8, (4,))
    slab.bytes_at(128, 4)[:] = b"\x01\x02\x03\x04"
    assert tensor.tolist() == [1, 2, 3, 4]


def test_a_tensor_made_in_inference_mode_is_an_ordinary_one(slab: Slab) -> None:
    with torch.inference_mode():
        tensor = slab.tensor(0, torch.float32, (4,))
    assert not tensor.is_inference()
    tensor.requires_grad_()


def test_empty_and_scalar_tensors(slab: Slab) -> None:
    assert slab.tensor(0, torch.float32, (0, 7)).shape == (0, 7)
    assert slab.tensor(0, torch.float32, ()).shape == ()


def test_a_slab_that_the_system_does_not_have_is_a_named_error() -> None:
    from narrowboat.errors import StorageError

    with pytest.raises(StorageError, match="lower the budget"):
        Slab(1 << 60)


def test_arrays_of_slab_tensors_are_copies_while_the_slab_is_open(slab: Slab) -> None:
    for _ in range(50):  # addresses are used again: a slab that goes must not take the next one's guard along
        Slab(4 * PAGE).close()
        slab = Slab(4 * PAGE)
        tensor = slab.tensor(0, torch.float32, (16,))
        arrays = tensor.numpy(), torch.from_dlpack(tensor)
        tensor.fill_(1.0)
        assert arrays[0].sum() == 0
        assert arrays[1].sum() == 0
    plain = torch.zeros(3)
    array = plain.numpy()
    plain.fill_(1.0)
    assert array.sum() == 3


def test_swapping_in_and_out_keeps_the_object(slab: Slab, parameter: nn.Parameter) -> None:
    identity, references = id(parameter), [parameter]
    slot = make_slot(parameter, slab)
    slab.tensor(0, torch.float32, (8, 8)).fill_(3.0)
    for _ in range(3):
        assert is_standin(parameter)
        slot.put_in()
        assert not is_standin(parameter)
        assert type(parameter) is nn.Parameter
        assert parameter.data_ptr() == slab.address
        assert torch.equal(parameter, torch.full((8, 8), 3.0))
        assert not slot.take_out()
    assert id(references[0]) == identity
    assert references[0] is parameter


@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_stand_in_reports_what_the_weight_is(slab: Slab, requires_grad: bool) -> None:
    parameter = nn.Parameter(torch.zeros(2, 3, 4, dtype=torch.bfloat16), requires_grad=requires_grad)
    make_slot(parameter, slab)
    assert is_standin(parameter)
    assert parameter.shape == (2, 3, 4)
    assert parameter.dtype == torch.bfloat16
    assert parameter.device == torch.device("cpu")
    assert not parameter.is_meta
    assert parameter.requires_grad == requires_grad
    assert parameter.is_leaf
    assert parameter.stride() == (12, 4, 1)
    assert parameter.is_contiguous()
    assert parameter.numel() == 24
    assert parameter.element_size() == 2
    assert parameter.nbytes == 48
    assert parameter.is_floating_point()
    assert len(parameter) == 2
    assert isinstance(parameter, nn.Parameter)
    assert not torch.overrides.has_torch_function((parameter,))
    assert "layer.weight" in repr(parameter)


def test_a_buffers_stand_in_is_no_parameter(slab: Slab) -> None:
    buffer = torch.zeros(4)
    make_slot(buffer, slab)
    assert is_standin(buffer)
    assert not isinstance(buffer, nn.Parameter)
    assert isinstance(buffer, torch.Tensor)


def test_operators_on_a_stand_in_run_on_the_weight(slab: Slab, parameter: nn.Parameter) -> None:
    slot = make_slot(parameter, slab)
    real = slab.tensor(0, torch.float32, (8, 8))
    real.copy_(torch.arange(64.0).view(8, 8))
    with torch.no_grad():
        assert torch.equal(parameter + 1, real + 1)
        assert torch.equal(torch.ones(2, 8) @ parameter.t(), torch.ones(2, 8) @ real.t())
        assert torch.equal(torch.cat([parameter, parameter]), torch.cat([real, real]))
        assert torch.equal(parameter[2], real[2])
        assert parameter[1, 2].item() == real[1, 2].item()
        assert parameter.tolist() == real.tolist()
        assert parameter.detach().numpy().tolist() == real.tolist()
        assert torch.equal(torch.stack(list(parameter)), real)
        assert torch.equal(copy.copy(parameter) * 2, real * 2)
    assert set(slot.weight.owner.touched) == {"layer.weight"}


def test_a_detached_alias_is_lazy_and_right_whatever_happens_in_between(slab: Slab, parameter: nn.Parameter) -> None:
    slot = make_slot(parameter, slab)
    slab.tensor(0, torch.float32, (8, 8)).fill_(2.0)
    for alias in (parameter.detach(), parameter.data):
        assert not slot.weight.owner.touched
        assert is_standin(alias)
        assert not alias.requires_grad
    alias = parameter.detach()
    slot.put_in()
    slot.take_out()
    assert torch.equal(alias, torch.full((8, 8), 2.0))


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.zero_(),
        lambda p: p.add_(1),
        lambda p: p.copy_(torch.zeros(8, 8)),
        lambda p: torch.add(torch.zeros(8, 8), 1, out=p),
        lambda p: p.detach().mul_(2),
        lambda p: setattr(p, "data", torch.zeros(8, 8)),
        lambda p: p.data.fill_(1),
    ],
)
def test_writing_to_a_stand_in_is_refused_and_changes_nothing(slab: Slab, parameter: nn.Parameter, write: Any) -> None:
    make_slot(parameter, slab)
    slab.tensor(0, torch.float32, (8, 8)).fill_(2.0)
    with pytest.raises(StreamedModelError, match=r"layer\.weight"), torch.no_grad():
        write(parameter)
    assert torch.equal(slab.tensor(0, torch.float32, (8, 8)), torch.full((8, 8), 2.0))


@pytest.mark.parametrize(
    "use",
    [lambda p: p.data_ptr(), lambda p: p.untyped_storage(), lambda p: p.share_memory_(), copy.deepcopy],
)
def test_what_would_need_bytes_behind_a_stand_in_is_refused(slab: Slab, parameter: nn.Parameter, use: Any) -> None:
    make_slot(parameter, slab)
    with pytest.raises(StreamedModelError, match=r"layer\.weight"):
        use(parameter)


@pytest.mark.parametrize(
    "take", [lambda p: p.detach(), lambda p: p[1:3], lambda p: p.t(), lambda p: p.data, lambda p: p.view(-1)[::2]]
)
def test_a_kept_view_is_noticed_and_rescued_before_its_place_is_overwritten(
    slab: Slab, parameter: nn.Parameter, take: Any
) -> None:
    slot = make_slot(parameter, slab)
    slab.tensor(0, torch.float32, (8, 8)).copy_(torch.arange(64.0).view(8, 8))
    slot.put_in()
    with torch.no_grad():
        kept = take(parameter)
    assert slot.take_out()
    assert slot.rescue() == 256
    slot.bind(slab.tensor(0, torch.float32, (8, 8)))
    slab.bytes_at(0, 256)[:] = b"\xff" * 256
    assert torch.equal(kept, take(torch.arange(64.0).view(8, 8)))
    slab.close()
    assert torch.equal(kept, take(torch.arange(64.0).view(8, 8)))
    slot.put_in()
    assert not slot.kept
    assert torch.isnan(parameter).all()


def test_nothing_kept_is_nothing_rescued(slab: Slab, parameter: nn.Parameter) -> None:
    slot = make_slot(parameter, slab)
    slot.put_in()
    with torch.no_grad():
        assert float((parameter * 2).sum()) == 0.0
        view = parameter[2:4]
        del view
    assert not slot.take_out()
    assert not slot.written


def test_a_write_to_a_weight_that_is_in_is_noticed(slab: Slab, parameter: nn.Parameter) -> None:
    slot = make_slot(parameter, slab)
    slot.put_in()
    with torch.no_grad():
        parameter.add_(1)
    assert slot.written
    assert slot.take_out()


def test_the_flag_for_gradients_can_be_set_at_any_time(slab: Slab, parameter: nn.Parameter) -> None:
    slot = make_slot(parameter, slab)
    parameter.requires_grad_(False)
    slot.put_in()
    assert not parameter.requires_grad
    slot.set_requires_grad(True)
    slot.take_out()
    assert parameter.requires_grad
    slot.put_in()
    assert parameter.requires_grad


def test_after_an_interruption_a_reset_makes_it_a_stand_in_again(
    slab: Slab, parameter: nn.Parameter, monkeypatch: pytest.MonkeyPatch
) -> None:
    import narrowboat.arena.slot as module

    slot = make_slot(parameter, slab)
    slab.tensor(0, torch.float32, (8, 8)).fill_(4.0)
    swap = module._swap_impl

    def interrupted(one: Any, other: Any) -> None:
        swap(one, other)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_swap_impl", interrupted)
        with pytest.raises(KeyboardInterrupt):
            slot.put_in()
    slot.reset()
    assert is_standin(parameter)
    slot.bind(slab.tensor(0, torch.float32, (8, 8)))
    slot.put_in()
    assert type(parameter) is nn.Parameter
    assert torch.equal(parameter, torch.full((8, 8), 4.0))


def test_locking_is_reported_as_granted_or_not() -> None:
    slab = Slab(PAGE, lock=True)
    assert slab.locked in (True, False)
    if os.geteuid() == 0:
        assert slab.locked
    assert not Slab(PAGE).locked
