"""What a child of the part about tasks does: make weights, and time each network alone on the device."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from safetensors.torch import load_file

import narrowboat as nb
from cuda_kit.children import Emit
from cuda_kit.place import Place
from narrowboat import zoo
from narrowboat.checkpoint import open_index
from narrowboat.profile.order import execution_order
from narrowboat.zoo.save import save_random_weights

_WARM, _TIMED = 3, 10


def write(emit: Emit, *, names: list[str], folder: str) -> None:
    """Packed random weights of zoo models, where they are not there; event ``weights``: bytes by name."""
    found = {}
    for name in names:
        target = Path(folder) / f"{name}.packed.safetensors"
        if not target.exists():
            plain = target.with_suffix(".plain.safetensors")
            save_random_weights(name, plain, overwrite=True)
            nb.pack(plain, target, order=execution_order(zoo.get(name), open_index(plain)))
            plain.unlink()
        found[name] = open_index(target).total_bytes
    emit("weights", bytes=found)


def alone(emit: Emit, *, names: list[str], folder: str, device: str) -> None:
    """Event ``alone``: seconds of a pass of each, all on the device and nobody beside it."""
    place = Place(device)
    found = {}
    for name in names:
        model = zoo.get(name)
        module = model().eval()
        stored = load_file(Path(folder) / f"{name}.packed.safetensors")
        module.load_state_dict({key: value for key, value in stored.items() if "narrowboat" not in key})
        module.to(place.torch_device)
        inputs = tuple(value.to(place.torch_device) for value in model.example_inputs())
        with torch.inference_mode():
            seconds = [place.timed(lambda m=module, i=inputs: m(*i))[0] for _ in range(_WARM + _TIMED)]
        found[name] = statistics.median(seconds[_WARM:])
        del module, stored
        place.empty()
    emit("alone", seconds=found)
