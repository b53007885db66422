"""The weights files of the benchmark: made once in a work folder, the same random weights in every format."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import nn

from narrowboat.checkpoint import open_index, pack
from narrowboat.machine.pagecache import drop_cached
from narrowboat.profile.order import execution_order
from narrowboat.zoo import MODELS, ZooModel
from narrowboat.zoo.save import save_random_weights


@dataclass(frozen=True, slots=True)
class Material:
    """One model and its weights at rest.

    Attributes:
        model: the zoo entry.
        plain: unpacked safetensors.
        packed: the same weights, packed by narrowboat.
        pth: the same weights, written by ``torch.save``.
        groups: a folder with the files that diffusers' group offload writes, one per leaf module.
        reference: output of the plain model, float32, flat; written by the first resident child.
    """

    model: ZooModel
    plain: Path
    packed: Path
    pth: Path
    groups: Path
    reference: Path

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return open_index(self.plain).total_bytes

    def drop_caches(self) -> None:
        """Get every copy of the weights out of the page cache."""
        for path in (self.plain, self.packed, self.pth, *self.groups.glob("*.safetensors")):
            if path.exists():
                drop_cached(path)


def material(name: str, work: Path) -> Material:
    """Where the files of zoo model ``name`` are, or will be."""
    return Material(
        model=MODELS[name],
        plain=work / f"{name}.safetensors",
        packed=work / f"{name}.packed.safetensors",
        pth=work / f"{name}.pth",
        groups=work / f"{name}.groups",
        reference=work / f"{name}.reference.npy",
    )


def make_files(files: Material, *, pth: bool, groups: bool) -> None:
    """Write what is not there yet; in a child process, because it computes."""
    if not files.plain.exists():
        save_random_weights(files.model.name, files.plain)
    if not files.packed.exists():
        pack(files.plain, files.packed, order=execution_order(files.model, open_index(files.plain)))
    if pth and not files.pth.exists():
        part = files.pth.with_suffix(".part")
        torch.save(load_file(files.plain), part)
        part.rename(files.pth)
    if groups and not files.groups.exists():
        part = files.groups.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        offload_in_groups(mapped(files), part)
        part.rename(files.groups)


def empty_module(factory: Callable[[], nn.Module]) -> nn.Module:
    """The module with its parameters on meta and its buffers real, as transformers and accelerate build it."""
    with init_empty_weights(include_buffers=False):
        return factory().eval()


def mapped(files: Material) -> nn.Module:
    """The module over the memory-mapped safetensors file: nothing is copied, pages are read when touched."""
    module = empty_module(files.model)
    module.load_state_dict(load_file(files.plain), assign=True)
    return module


def offload_in_groups(module: nn.Module, folder: Path) -> None:
    """diffusers' group offload to disk; it writes one file per leaf module, unless the file is there."""
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        module,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        offload_to_disk_path=str(folder),
    )
