"""``nb.stream`` and ``nb.session``: from a model and its weights at rest to a model that runs inside a budget."""

from __future__ import annotations

import atexit
import os
import uuid
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from narrowboat.arena.device.find import open_device
from narrowboat.arena.device.interface import Device
from narrowboat.checkpoint import WeightsIndex, pack
from narrowboat.errors import StorageError, StreamedModelError, UsageError
from narrowboat.machine.cache import cache_folder
from narrowboat.machine.memory import process_memory
from narrowboat.plan.schemes import check_names
from narrowboat.profile.order import split_example
from narrowboat.profile.skeleton import build_skeleton, is_materialised, tensor_names
from narrowboat.profile.warmup import warm_up
from narrowboat.quantities import parse_bytes
from narrowboat.stream.auto import follow_limits, initial_budget
from narrowboat.stream.device_ground import DeviceGround
from narrowboat.stream.ground import HostGround
from narrowboat.stream.integrity import MODES
from narrowboat.stream.prepare import Prepared, prepare
from narrowboat.stream.session import Session
from narrowboat.stream.tiers import Budget, check_free, host_bytes, split_budget
from narrowboat.stream.tiling import fit

_SESSION = "_narrowboat_session"
_IO = ("auto", "direct", "buffered")


def stream(
    model: Callable[[], nn.Module] | nn.Module,
    weights: str | Path | WeightsIndex | None = None,
    *,
    budget: Budget,
    example: tuple[Any, ...] | Mapping[str, Any] | None = None,
    device: str | torch.device | Device = "cpu",
    strict: bool = True,
    io: str = "auto",
    lock_memory: bool = False,
    verify: str = "off",
    offload_folder: str | Path | None = None,
    scheme: str = "best",
    objective: str = "throughput",
) -> nn.Module:
    """Return the model, of its own class and callable as before, running from storage within ``budget`` bytes.

    Args:
        model: a factory taking no arguments (built without storage for its parameters), a module on meta, or a
            materialised module (its own weights are let go).
        weights: a safetensors file, a sharded index, a Hugging Face folder, a ``.pth`` file, or an index of one of
            these (``checkpoint.open_index``). None for a
            materialised module: its weights are then first written to ``offload_folder``.
        budget: bytes for weights, buffers, activations and workspaces above the process baseline: an int,
            ``"300MB"`` or ``"300MiB"``; or ``"auto"``: what the machine can spare, followed while the session lives.
            On a device, bytes of its memory; ``{"cuda": "6GiB", "cpu": "8GiB"}`` also says how many bytes of pinned
            host memory may be used, for buffers and a cache of weights (else up to half of what the host can spare).
        example: inputs of one pass, a tuple of positional or a dict of keyword arguments; only shapes are used. If
            left out, the factory's ``example_inputs()`` is used where there is one, else the first real call is
            the trace.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; or as ``arena.device.find.open_device`` takes it, an emulated one
            (``"emulated:6GiB:12GB"``) among them.
        strict: refuse a weights file with tensors the model does not have.
        io: ``"direct"`` (refuse if it cannot be had), ``"buffered"``, or ``"auto"``.
        lock_memory: keep the arena from being swapped out.
        verify: ``"load"`` compares each weight with its digest in a packed file when it first comes in, ``"always"``
            now and then later too (at some 0.5 GB/s per core); a damaged one raises ``DigestError`` from the call.
        offload_folder: where a materialised module's weights are written; deleted again when the session closes.
            None: the user's cache folder.
        scheme: ``"best"``; or, for comparison, ``"swapnet"``, ``"first-resident"``, ``"window"``
            (``narrowboat.plan.schemes`` says what they do).
        objective: what the plan is to make short: ``"throughput"``, passes back to back; ``"latency"``, passes with
            pauses between them, in which the reader fills its window.

    Raises:
        BudgetError: the budget cannot hold the model (nothing has been read); ``.minimum`` is the smallest that can.
        WeightsError: the file is missing, malformed, or not this model's.
        ModelError: the factory fails, or the example does not fit the model.
        NoDeviceError, DriverTooOldError: the device cannot be used, and why.
        DeviceMemoryError: the budget is above what the device has free.
        PinnedMemoryError: the system refuses to pin so much host memory.
        ForeignHooksError: accelerate's or diffusers' hooks are on the model.
        UsageError: an argument cannot be used as given.
    """
    accelerator = _accelerator(device)
    main_budget, for_host = split_budget(budget, accelerator)
    if accelerator is not None and main_budget == "auto":
        raise UsageError("budget='auto' follows the host's memory: give a number of bytes for a device")
    nbytes = None if main_budget == "auto" else parse_bytes(main_budget, what="budget")
    check_names(scheme, objective)
    if verify not in MODES:
        raise UsageError(f"verify must be one of {', '.join(MODES)}, not {verify!r}")
    if io not in _IO:
        raise UsageError(f"io must be one of {', '.join(_IO)}, not {io!r}")
    warm_up()
    baseline = process_memory().rss
    if example is None:
        maker = getattr(model, "example_inputs", None)
        example = maker() if callable(maker) else None
    pair = split_example(example) if example is not None else None
    if pair is not None:  # the trace is made on the processor, of shapes alone
        pair = tree_map(lambda v: v.cpu() if isinstance(v, torch.Tensor) and v.is_cuda else v, pair)
    if weights is not None and not isinstance(weights, (str, os.PathLike, WeightsIndex)):
        raise UsageError(f"weights must be the path of a file or folder, not {type(weights).__name__}")
    before = model.__dict__.get(_SESSION) if isinstance(model, nn.Module) else None
    if isinstance(before, Session) and before.closed:
        before.dismantle()
    if weights is None:
        if not isinstance(model, nn.Module):
            raise UsageError("weights= is missing: give the weights file (a materialised module may come without)")
        if not is_materialised(model):
            raise UsageError(
                "weights= is missing, and the module is on meta: there is nothing to take its weights from"
            )
    cleanup = None
    if weights is None:
        weights, cleanup = _offload(build_skeleton(model), offload_folder)
    try:
        prepared = prepare(model, weights, pair, strict=strict, device=accelerator)
        # Everything that can be refused is refused before the module is touched.
        ceiling = prepared.enough()
        automatic = nbytes is None
        if nbytes is None:
            nbytes, _ = initial_budget(ceiling)
        prepared.scheme, prepared.objective = scheme, objective
        if accelerator is None:
            prepared = fit(prepared, nbytes, whole_stacks=verify != "off")
        made = Session(
            prepared,
            budget=nbytes,
            io=io,
            verify=verify,
            ground=_ground(accelerator, prepared, nbytes, for_host)
            if accelerator is not None
            else HostGround(baseline + prepared.library_bytes, lock_memory=lock_memory),
            cleanup=cleanup,
        )
    except BaseException:
        if cleanup is not None:
            cleanup()
        raise
    if automatic:
        follow_limits(made, ceiling)
    # In the module's own dictionary: the two then live and die together, and only the reader needs stopping.
    prepared.module.__dict__[_SESSION] = made
    weakref.finalize(prepared.module, made.reader.close, wait=False)
    return prepared.module


def session(model: nn.Module) -> Session:
    """The session of a streamed model.

    Raises:
        StreamedModelError: the model was not made by ``nb.stream``.
    """
    found = model.__dict__.get(_SESSION) if isinstance(model, nn.Module) else None
    if not isinstance(found, Session):
        raise StreamedModelError("this model is not streamed: make one with nb.stream(model, weights, budget=...)")
    return found


def _accelerator(device: str | torch.device | Device) -> Device | None:
    """The device to compute on; None for the processor."""
    return None if str(device) in ("cpu", "cpu:0") else open_device(device)


def _ground(device: Device, prepared: Prepared, nbytes: int, for_host: int | None) -> DeviceGround:
    """Everything that can be refused for want of memory is refused here."""
    prepared.check(nbytes)
    check_free(device, nbytes)
    useful = sum(group.block.nbytes for group in prepared.workload()[1])
    useful += 2 * prepared.storage.staging_bytes
    return DeviceGround(device, host_bytes(for_host, useful), asked=for_host is not None)


def _offload(module: nn.Module, folder: str | Path | None) -> tuple[Path, Callable[[], None]]:
    """Write a materialised module's weights to a file of its own name; returns it and what deletes it."""
    place = Path(folder) if folder is not None else cache_folder() / "offload"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot make the offload folder {place}: {error.strerror}; give another offload_folder"
        ) from error
    # A name that no other model can have: two models never share an offload file.
    path = place / f"offload-{os.getpid()}-{uuid.uuid4().hex}.safetensors"
    state = {names[0]: tensor.detach() for tensor, names, _ in tensor_names(module).values()}
    pack(state, path)

    def cleanup() -> None:
        path.unlink(missing_ok=True)
        atexit.unregister(cleanup)

    atexit.register(cleanup)
    return path, cleanup
