"""The device's memory seen from outside every process that uses it: NVML, which needs no CUDA context."""

from __future__ import annotations

import ctypes
from typing import Any

_TEXT = 96  # bytes, enough for a version


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Nvml:
    """NVML's view of one GPU; says None everywhere if there is no NVML."""

    def __init__(self) -> None:
        self._library: ctypes.CDLL | None = None
        self._handle = ctypes.c_void_p()
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
            if library.nvmlInit_v2() == 0:
                self._library = library
        except (OSError, AttributeError):
            return
        self.choose("")

    def choose(self, uuid: str) -> None:
        """Look at the GPU with this UUID, as torch says it; the first one if it is empty or not known."""
        if self._library is None:
            return
        handle = ctypes.c_void_p()
        named = f"GPU-{uuid.removeprefix('GPU-')}".encode()
        library = self._library
        found = bool(uuid) and library.nvmlDeviceGetHandleByUUID(named, ctypes.byref(handle)) == 0
        if found or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)) == 0:
            self._handle = handle
        else:
            self._library = None

    def used(self) -> int | None:
        """Bytes in use by everybody."""
        memory = _Memory()
        if self._library is None or self._library.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(memory)) != 0:
            return None
        return int(memory.total - memory.free)

    def facts(self) -> dict[str, Any]:
        """Driver, and the link to the host now and at its best (an idle link is slower)."""
        if self._library is None:
            return {}
        text = ctypes.create_string_buffer(_TEXT)
        found: dict[str, Any] = {}
        if self._library.nvmlSystemGetDriverVersion(text, _TEXT) == 0:
            found["driver"] = text.value.decode()
        for name, call in (
            ("pcie_generation", "nvmlDeviceGetMaxPcieLinkGeneration"),
            ("pcie_width", "nvmlDeviceGetMaxPcieLinkWidth"),
        ):
            value = ctypes.c_uint()
            if getattr(self._library, call)(self._handle, ctypes.byref(value)) == 0:
                found[name] = value.value
        return found
