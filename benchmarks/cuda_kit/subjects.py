"""Who is compared in inference: how each gets from the weights file to a model that computes on the device."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from cuda_kit.children import NotAvailable
from cuda_kit.models import Spec, blocks_path
from cuda_kit.place import Place


@dataclass(frozen=True, slots=True)
class Budget:
    """What a peer with a budget is given.

    Attributes:
        weights: bytes of the device for weights.
        beside: bytes for the rest, as narrowboat counts them.
    """

    weights: int
    beside: int


@dataclass(frozen=True, slots=True)
class Peer:
    """One of the others.

    Attributes:
        label: its name in tables.
        load: a model that can be called, and how many passes it needs before it is what it will be.
        needs: a package.
        budgets: it takes a budget.
        gpu: it cannot be tried on an emulated device.
    """

    label: str
    load: Callable[[Spec, Path, Place, Budget], tuple[Callable[..., Any], int]]
    needs: str = ""
    budgets: bool = False
    gpu: bool = False


def resident(spec: Spec, path: Path, place: Place) -> nn.Module:
    """Everything on the device, in PyTorch's own memory."""
    module = spec.skeleton()
    state = load_file(path, device=str(place.torch_device))
    if not place.is_cuda:  # out of the mapping, into ordinary memory
        state = {name: tensor.clone() for name, tensor in state.items()}
    module.load_state_dict(state, assign=True)
    return module.to(place.torch_device)


def _on_host(spec: Spec, path: Path) -> nn.Module:
    """In ordinary host memory: a mapped file would be copied from more slowly."""
    module = spec.skeleton()
    module.load_state_dict({name: tensor.clone() for name, tensor in load_file(path).items()}, assign=True)
    gc.collect()
    return module


def _accelerate(spec: Spec, path: Path, place: Place, budget: Budget) -> tuple[Callable[..., Any], int]:
    """``cpu_offload``: every layer comes in when it is called."""
    from accelerate import cpu_offload

    module = _on_host(spec, path)
    cpu_offload(module, execution_device=place.torch_device, state_dict=module.state_dict())
    return module, 1


def _accelerate_placed(spec: Spec, path: Path, place: Place, budget: Budget) -> tuple[Callable[..., Any], int]:
    """``max_memory``: as many first layers on the device as fit, the others as with ``cpu_offload``."""
    from accelerate import dispatch_model, infer_auto_device_map

    module = _on_host(spec, path)
    index = place.torch_device.index or 0
    whole = list(getattr(module, "_no_split_modules", None) or ())
    limits: dict[int | str, int] = {index: budget.weights, "cpu": 1 << 50}
    places = infer_auto_device_map(module, max_memory=limits, no_split_module_classes=whole, dtype=torch.bfloat16)
    dispatch_model(module, places, main_device=index)
    return module, 1


def _diffusers(level: str, record: bool) -> Callable[[Spec, Path, Place, Budget], tuple[Callable[..., Any], int]]:
    def load(spec: Spec, path: Path, place: Place, budget: Budget) -> tuple[Callable[..., Any], int]:
        from diffusers.hooks import apply_group_offloading

        module = spec.skeleton()
        module.load_state_dict(load_file(path), assign=True)  # it makes a pinned copy of its own
        apply_group_offloading(
            module,
            onload_device=place.torch_device,
            offload_device=torch.device("cpu"),
            offload_type=f"{level}_level",
            num_blocks_per_group=1 if level == "block" else None,
            use_stream=place.is_cuda,
            record_stream=record and place.is_cuda,
            block_modules=blocks_path(module).split(".")[:-1] if level == "block" else None,
        )
        return module, 2  # it learns the order of its groups in the first

    return load


def _flextensor(spec: Spec, path: Path, place: Place, budget: Budget) -> tuple[Callable[..., Any], int]:
    """NVIDIA's: the repeated layers offloaded, the others on the device, within a share of the device's memory."""
    flextensor = importlib.import_module("flextensor")
    module = _on_host(spec, path)
    layers = blocks_path(module)
    for name, child in module.named_modules():
        if not f"{name}.".startswith(f"{layers}."):
            for tensor in (*child._parameters.values(), *child._buffers.values()):
                if tensor is not None:
                    tensor.data = tensor.data.to(place.torch_device)
    room = (place.held() or 0) + budget.weights + budget.beside
    config = flextensor.OffloadConfig(
        gpu_device=place.torch_device.index or 0,
        include_patterns=[f"{layers}.*"],
        max_gpu_mem_fraction=min(room / place.total(), 1.0),
    )
    made = flextensor.offload(module, config)
    return made, int(flextensor.get_offload_manager().iters_before_inference) + 1


PEERS: dict[str, Peer] = {
    "accelerate": Peer("accelerate cpu_offload", _accelerate, "accelerate"),
    "accelerate_placed": Peer("accelerate max_memory", _accelerate_placed, "accelerate", budgets=True, gpu=True),
    "diffusers_block": Peer("diffusers block_level", _diffusers("block", False), "diffusers"),
    "diffusers_leaf": Peer("diffusers leaf_level", _diffusers("leaf", False), "diffusers"),
    "diffusers_block_record": Peer(
        "diffusers block_level, record_stream", _diffusers("block", True), "diffusers", gpu=True
    ),
    "diffusers_leaf_record": Peer(
        "diffusers leaf_level, record_stream", _diffusers("leaf", True), "diffusers", gpu=True
    ),
    "flextensor": Peer("flextensor", _flextensor, "flextensor", budgets=True, gpu=True),
}
LABELS = {"resident": "plain PyTorch, all on the device", "narrowboat": "narrowboat"} | {
    name: peer.label for name, peer in PEERS.items()
}


def load_peer(name: str, spec: Spec, path: Path, place: Place, budget: Budget) -> tuple[Callable[..., Any], int]:
    """The model as one of the others runs it.

    Raises:
        ModuleNotFoundError: its package is not installed.
        NotAvailable: it needs a GPU.
    """
    peer = PEERS[name]
    importlib.import_module(peer.needs)
    if peer.gpu and not place.is_cuda:
        raise NotAvailable(f"{peer.label} needs a GPU")
    return peer.load(spec, path, place, budget)
