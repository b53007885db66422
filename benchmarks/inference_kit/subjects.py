"""What is compared: for each subject, how a model comes from its file to the point where it can be called."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import set_module_tensor_to_device
from safetensors import safe_open
from torch import nn

import narrowboat as nb
from inference_kit.materials import Material, empty_module, mapped, offload_in_groups
from narrowboat.machine.malloc import MallocPolicy
from narrowboat.machine.memory import reset_peak


@dataclass(slots=True)
class Running:
    """A model that can be called.

    Attributes:
        module: the model.
        after_first: called once after the first answer, outside every measurement.
        stats: what the subject itself has to tell at the end.
    """

    module: nn.Module
    after_first: Callable[[], None] = lambda: None
    stats: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True, slots=True)
class Subject:
    """One way to run a model.

    Attributes:
        label: its name in tables.
        load: from the files and the budget (bytes) to a model that can be called.
        limited: it runs under the memory limit.
        reads: the file whose page cache it may fill.
        ours: it is narrowboat.
        one_budget: it takes no budget and is too slow to be shown at more than the first.
        policy: the allocator policy it runs under (narrowboat chooses its own). For each peer the one that serves it
            best: with glibc's own, diffusers comes to hold all weights, and accelerate is killed at small budgets.
    """

    label: str
    load: Callable[[Material, int], Running]
    reads: Callable[[Material], Path]
    limited: bool = True
    ours: bool = False
    one_budget: bool = False
    policy: MallocPolicy = MallocPolicy.DEFAULT


def _resident(files: Material, budget: int) -> Running:
    """``load_file`` and the first answer from the mapping; from then on everything in ordinary memory."""
    module = mapped(files)

    def settle() -> None:
        # New tensors: assigning to .data would keep the mapping alive, which the old ones are views of.
        module.load_state_dict({name: t.detach().clone() for name, t in module.state_dict().items()}, assign=True)
        gc.collect()
        reset_peak()

    return Running(module, settle)


def _mmap(files: Material, budget: int) -> Running:
    return Running(mapped(files))


def _torch_mmap(files: Material, budget: int) -> Running:
    module = empty_module(files.model)
    module.load_state_dict(torch.load(files.pth, mmap=True, weights_only=True), assign=True)
    return Running(module)


def _accelerate(files: Material, budget: int) -> Running:
    """Everything on disk, over an index into the safetensors file: what transformers sets up."""
    module = empty_module(files.model)
    return _dispatched(module, files, {"": "disk"})


def _accelerate_placed(files: Material, budget: int) -> Running:
    """As many first layers in memory as fit in 60 % of the budget, the rest on disk.

    accelerate's ``max_memory`` counts weights only; its users are told to leave room for everything else.
    """
    module = empty_module(files.model)
    places = infer_auto_device_map(module, max_memory={"cpu": int(budget * 0.6), "disk": 1 << 50})
    return _dispatched(module, files, places)


def _dispatched(module: nn.Module, files: Material, places: dict[str, Any]) -> Running:
    index = {}
    buffers = dict(module.named_buffers())
    on_disk = [name for name, device in places.items() if device == "disk"]
    with safe_open(files.plain, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118 - a safe_open is no dict
            inside = any(not place or name == place or name.startswith(place + ".") for place in on_disk)
            if name in buffers or not inside:
                set_module_tensor_to_device(module, name, "cpu", value=stored.get_tensor(name).clone())
            else:
                index[name] = {"safetensors_file": str(files.plain), "weight_name": name}
    if index:
        dispatch_model(module, places, main_device="cpu", offload_index=index)
    return Running(module)


def _diffusers(files: Material, budget: int) -> Running:
    """Over the files of an earlier set-up: a first one needs all weights in memory, and would be killed here."""
    module = mapped(files)
    offload_in_groups(module, files.groups)
    return Running(module)


def _narrowboat(pick: Callable[[Material], Path]) -> Callable[[Material, int], Running]:
    def load(files: Material, budget: int) -> Running:
        module = nb.stream(files.model, pick(files), budget=budget)
        return Running(module, stats=lambda: narrowboat_stats(module))

    return load


def narrowboat_stats(module: nn.Module) -> dict[str, Any]:
    """What a narrowboat session tells of its passes, as far as it is recorded."""
    session = nb.session(module)
    stats = session.stats()
    kept = (
        "bytes_read",
        "stall_ms",
        "read_ms",
        "predicted_latency_ms",
        "min_budget_bytes",
        "resident_bytes",
        "window_bytes",
        "fixed_bytes",
        "fixed_parts",
        "tiled_layers",
        "copied_bytes",
        "direct_io",
        "bandwidth_bytes_per_s",
        "allocator_policy",
        "misses",
        "off_trace_passes",
        "peak_bytes",
    )
    return {key: stats[key] for key in kept}


def _plain(files: Material) -> Path:
    return files.plain


def _packed(files: Material) -> Path:
    return files.packed


def _pth(files: Material) -> Path:
    return files.pth


SUBJECTS: dict[str, Subject] = {
    "resident": Subject("plain PyTorch, all in memory", _resident, _plain, limited=False),
    "narrowboat": Subject("narrowboat, packed", _narrowboat(_packed), _packed, ours=True),
    "narrowboat_unpacked": Subject("narrowboat, unpacked", _narrowboat(_plain), _plain, ours=True),
    "mmap": Subject("mmap, safetensors", _mmap, _plain),
    "torch_mmap": Subject("mmap, torch.load", _torch_mmap, _pth),
    "accelerate": Subject("accelerate, all on disk", _accelerate, _plain, policy=MallocPolicy.BALANCED),
    "accelerate_placed": Subject("accelerate, max_memory", _accelerate_placed, _plain, policy=MallocPolicy.BALANCED),
    "diffusers": Subject("diffusers group offload", _diffusers, _plain, one_budget=True, policy=MallocPolicy.STRICT),
}
PEERS = tuple(name for name, subject in SUBJECTS.items() if subject.limited and not subject.ours)
RIVALS = ("mmap", "torch_mmap", "accelerate", "accelerate_placed")
