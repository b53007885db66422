"""Traces kept between processes, in the user's cache folder.

A trace is a prediction: a stale one costs speed, never correctness. It is found again by everything that shapes it:
the module tree with its settings and the code of its classes, the weights' names and shapes, the example's shapes,
and the versions of PyTorch and of this package.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from narrowboat.machine.cache import cache_folder, write_durably
from narrowboat.profile.skeleton import tensor_names
from narrowboat.profile.use_trace import UseTrace

_FORMAT = 10
_SIMPLE = (bool, int, float, str, type(None), torch.dtype, torch.Size)


def fingerprint(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What a trace of ``module`` on these inputs depends on, as a hexadecimal digest."""
    digest = hashlib.sha256()
    for part in _parts(module, args, kwargs):
        digest.update(part.encode("utf-8", "backslashreplace") + b"\0")
    return digest.hexdigest()


def _parts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[str]:
    from narrowboat import __version__

    alone = torch.get_num_threads() == 1  # convolutions choose other kernels then
    yield f"{_FORMAT} {__version__} {torch.__version__} {torch.get_default_dtype()} {alone}"
    yield str(torch.is_autocast_enabled("cpu"))
    files: set[str] = set()
    for name, child in module.named_modules():
        kind = type(child)
        yield f"{name} {kind.__module__}.{kind.__qualname__} {_settings(child)}"
        config = getattr(child, "config", None)
        if hasattr(config, "to_json_string"):
            yield repr(config)
        code = getattr(kind.forward, "__code__", None)
        if code is not None:
            yield _code(code)
        file = getattr(sys.modules.get(kind.__module__), "__file__", None)
        if file is not None and file not in files:
            files.add(file)
            yield _stamp(file)
    for tensor, names, is_parameter in tensor_names(module).values():
        yield f"{names} {tuple(tensor.shape)} {tensor.dtype} {is_parameter} {tensor.requires_grad}"
    leaves, spec = tree_flatten((args, kwargs))
    yield str(spec)
    for leaf in leaves:
        yield f"{tuple(leaf.shape)} {leaf.dtype} {leaf.stride()}" if isinstance(leaf, torch.Tensor) else repr(leaf)


def _settings(child: nn.Module) -> str:
    found = {}
    for key, value in child.__dict__.items():
        members = value if isinstance(value, (tuple, list)) else (value,)
        if all(isinstance(member, _SIMPLE) for member in members):
            found[key] = repr(value)
    return json.dumps(found, sort_keys=True)


def _code(code: CodeType) -> str:
    constants = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _stamp(file: str) -> str:
    try:
        status = os.stat(file)
    except OSError:
        return file
    return f"{file} {status.st_mtime_ns} {status.st_size}"


def _path(key: str) -> Path:
    return cache_folder() / "traces" / f"{key}.json"


def load_trace(key: str) -> UseTrace | None:
    """The trace kept under ``key``; None if there is none, or it cannot be read."""
    try:
        kept = json.loads(_path(key).read_text(encoding="utf-8"))
        return UseTrace(
            events=[(int(number), int(kind)) for number, kind in kept["events"]],
            uses=[[int(w) for w in step] for step in kept["uses"]],
            holds=[(int(w), int(first), int(last)) for w, first, last in kept["holds"]],
            flops=[float(f) for f in kept["flops"]],
            traffic=[float(t) for t in kept["traffic"]],
            peaks=[int(p) for p in kept["peaks"]],
            largest=[int(n) for n in kept["largest"]],
            looked_up=[int(n) for n in kept["looked_up"]],
            workspaces=[int(n) for n in kept["workspaces"]],
            columns=[int(n) for n in kept["columns"]],
            fresh=[int(n) for n in kept["fresh"]],
            rows=[int(n) for n in kept["rows"]],
            activation_bytes=int(kept["activation_bytes"]),
            taken=tuple(int(nbytes) for nbytes in kept["taken"]),
            written=set(kept["written"]),
            output_bytes=int(kept["output_bytes"]),
            alive=[int(nbytes) for nbytes in kept["alive"]],
            cache_bytes=int(kept["cache_bytes"]),
            whole=set(kept["whole"]),
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def save_trace(key: str, trace: UseTrace) -> None:
    """Keep ``trace`` for later processes; where the cache folder cannot be written, it is made anew each time."""
    fields = asdict(trace)
    fields["written"], fields["whole"] = sorted(trace.written), sorted(trace.whole)
    try:
        write_durably(_path(key), json.dumps(fields, separators=(",", ":")))
    except OSError:
        return
