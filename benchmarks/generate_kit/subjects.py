"""What is compared: for each subject, how a decoder comes from its folder to the point where it can generate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import disk_offload, dispatch_model

import narrowboat as nb
from generate_kit.airllm_site import airllm_model
from generate_kit.folders import DECODERS, Folders, mapped
from inference_kit.materials import empty_module
from inference_kit.subjects import narrowboat_stats
from narrowboat.checkpoint import open_index
from narrowboat.machine.malloc import MallocPolicy

SHARE = 0.6  # of the budget, for weights in memory: accelerate's ``max_memory`` counts nothing else


@dataclass(slots=True)
class Running:
    """A model that generates.

    Attributes:
        generate: transformers' ``generate``.
        stats: what the subject itself has to tell at the end.
    """

    generate: Callable[..., torch.Tensor]
    stats: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True, slots=True)
class Subject:
    """One way to generate.

    Attributes:
        label: its name in tables.
        load: from the folders, the budget (bytes) and the tokens at once to a model that generates.
        limited: it runs under the memory limit.
        ours: it is narrowboat.
        family: whose it is, for the checks: ``"accelerate"``, ``"airllm"`` or empty.
        policy: the allocator policy that serves it best (narrowboat chooses its own).
    """

    label: str
    load: Callable[[Folders, int, int], Running]
    limited: bool = True
    ours: bool = False
    family: str = ""
    policy: MallocPolicy = MallocPolicy.DEFAULT


def _plain(made: Folders, budget: int, tokens: int) -> Running:
    """``from_pretrained`` as everybody writes it."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(made.plain, dtype="auto")
    return Running(model.generate)


def _mmap(made: Folders, budget: int, tokens: int) -> Running:
    model: Any = mapped(made)
    return Running(model.generate)


def _narrowboat(pick: Callable[[Folders], Path]) -> Callable[[Folders, int, int], Running]:
    def load(made: Folders, budget: int, tokens: int) -> Running:
        model: Any = nb.stream_pretrained(pick(made), budget=budget, max_tokens=tokens)
        return Running(model.generate, stats=lambda: narrowboat_stats(model))

    return load


def _accelerate_disk(made: Folders, budget: int, tokens: int) -> Running:
    """``disk_offload`` over the array files of an earlier set-up, which needs all weights in memory."""
    model: Any = empty_module(DECODERS[made.name])
    disk_offload(model, str(made.arrays), execution_device=torch.device("cpu"))
    return Running(model.generate)


def _accelerate_index(made: Folders, budget: int, tokens: int) -> Running:
    """``dispatch_model`` with everything on disk, over an index into the safetensors files."""
    model: Any = empty_module(DECODERS[made.name])
    index = {
        name: {"safetensors_file": str(entry.file), "weight_name": name}
        for name, entry in open_index(made.plain).entries.items()
    }
    dispatch_model(model, {"": "disk"}, main_device="cpu", offload_index=index)
    return Running(model.generate)


def _accelerate_placed(made: Folders, budget: int, tokens: int) -> Running:
    """transformers' own way: first layers in memory as far as ``max_memory`` goes, the rest on disk."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        made.plain,
        dtype="auto",
        device_map="auto",
        max_memory={"cpu": int(budget * SHARE)},
        offload_folder=str(made.scratch),
    )
    return Running(model.generate)


def _airllm(made: Folders, budget: int, tokens: int) -> Running:
    """Over the layer files of an earlier set-up."""
    return Running(airllm_model(made.plain, made.layers).generate)


SUBJECTS: dict[str, Subject] = {
    "resident": Subject("plain transformers, all in memory", _plain, limited=False),
    "narrowboat": Subject("narrowboat, packed", _narrowboat(lambda made: made.packed), ours=True),
    "narrowboat_unpacked": Subject("narrowboat, folder as it is", _narrowboat(lambda made: made.plain), ours=True),
    "accelerate_disk": Subject(
        "accelerate disk_offload", _accelerate_disk, family="accelerate", policy=MallocPolicy.BALANCED
    ),
    "accelerate_index": Subject(
        "accelerate, safetensors index", _accelerate_index, family="accelerate", policy=MallocPolicy.BALANCED
    ),
    "accelerate_placed": Subject(
        "transformers device_map, max_memory", _accelerate_placed, family="accelerate", policy=MallocPolicy.BALANCED
    ),
    "airllm": Subject("AirLLM", _airllm, family="airllm", policy=MallocPolicy.BALANCED),
    "mmap": Subject("mmap, safetensors", _mmap),
    "transformers": Subject("plain transformers, limited", _plain),
}
