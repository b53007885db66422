"""Tensors over memory that is not PyTorch's, by DLPack (version 0 of its C structures, which every torch reads).

Each tensor gets a storage object of its own, as ``arena.slot`` counts who refers to it. The structure, and whatever
keeps the memory there, live until torch calls the deleter.
"""

from __future__ import annotations

import atexit
import ctypes
from typing import Any

import torch

_CPU, _CUDA, _CUDA_HOST = 1, 2, 3
_INT, _UINT, _FLOAT, _BFLOAT, _COMPLEX, _BOOL = 0, 1, 2, 4, 5, 6
_CODES: dict[torch.dtype, tuple[int, int]] = {
    torch.int8: (_INT, 8),
    torch.int16: (_INT, 16),
    torch.int32: (_INT, 32),
    torch.int64: (_INT, 64),
    torch.uint8: (_UINT, 8),
    torch.float16: (_FLOAT, 16),
    torch.float32: (_FLOAT, 32),
    torch.float64: (_FLOAT, 64),
    torch.bfloat16: (_BFLOAT, 16),
    torch.complex64: (_COMPLEX, 64),
    torch.complex128: (_COMPLEX, 128),
}


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))
_alive: dict[int, tuple[_Managed, Any, object]] = {}  # by the structure's address


@_Deleter
def _forget(managed: Any) -> None:
    _alive.pop(ctypes.addressof(managed.contents), None)


@atexit.register
def _let_be() -> None:
    # Tensors that outlive the interpreter must not call back into it, nor find their structure gone.
    for managed, _, _ in _alive.values():
        managed.deleter = _Deleter()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_alive))


_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype = ctypes.py_object
_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


def tensor_at(
    address: int, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device, owner: object
) -> torch.Tensor:
    """A contiguous tensor of ``shape`` over the bytes at ``address`` of ``device``, by reference.

    Args:
        owner: kept alive as long as the tensor's storage is.
    """
    count = 1
    for size in shape:
        count *= size
    # Made outside inference mode whatever the caller's, so that it is an ordinary tensor.
    with torch.inference_mode(False), torch.no_grad():
        if count == 0:
            return torch.empty(shape, dtype=dtype, device=device)
        flat = _CODES.get(dtype, (_UINT, 8))
        length = count if dtype in _CODES else count * dtype.itemsize
        managed = _Managed()
        extent = (ctypes.c_int64 * 1)(length)
        managed.tensor = _Tensor(
            address, _CUDA if device.type == "cuda" else _CPU, device.index or 0, 1, *flat, 1, extent, None, 0
        )
        managed.deleter = _forget
        place = ctypes.addressof(managed)
        _alive[place] = (managed, extent, owner)
        made = torch.utils.dlpack.from_dlpack(_capsule(place, b"dltensor", None))
        # .data: without a record of the flat tensor it is a view of, which would count as a view kept.
        return made.view(dtype).view(shape).data
