"""The tensors of a ``torch.save`` file (``.pth``, ``.pt``, ``.bin``, ``.ckpt``), located without loading them.

Such a file is a zip archive: a pickle that describes the tensors, and one uncompressed record per
storage. ``torch.load`` onto the meta device reads the pickle alone (always with ``weights_only=True``, so no
code in it runs) and leaves in every storage the offset of its record. The offsets are checked against
the archive's own directory before anybody reads by them.
"""

from __future__ import annotations

import math
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from narrowboat.checkpoint.dtypes import SAFETENSORS_CODES
from narrowboat.checkpoint.entry import FileStamp, FileTensors, TensorEntry
from narrowboat.checkpoint.files import drop_cache, no_readahead, opened, read_exactly
from narrowboat.errors import NarrowboatError, WeightsFormatError

ZIP_MAGIC = b"PK\x03\x04"
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_LOCAL_HEADER = 30  # fixed part of a zip local file header; name and extra field follow


def read_torch(path: Path) -> FileTensors:
    """The tensors of the ``torch.save`` file ``path``, in the order of its state dict.

    Names that share one storage, offset, shape and stride are one entry and its aliases. A tensor whose
    elements are not in C order (saved transposed or expanded) has a ``stride`` in its entry.

    Raises:
        WeightsNotFoundError: no such file, or no permission.
        WeightsFormatError: not a zip archive of ``torch.save``, truncated, objects that a weights-only
            load refuses, or values that are not dense tensors.
        StorageError: the read failed.
    """
    with opened(path) as (descriptor, status):
        if status.st_size < 4 or read_exactly(descriptor, path, 0, 4) != ZIP_MAGIC:
            raise WeightsFormatError(
                f"{path} is not a zip archive of torch.save: it is damaged, or was written by PyTorch before 1.6, "
                f"or in its legacy format; load it once with torch.load(path, weights_only=True) and save that dict "
                f"with narrowboat.pack (or with torch.save)"
            )
        records = _records(path, descriptor)
        tensors = _flat_state_dict(path, _load_skeleton(path))
    entries: dict[str, TensorEntry] = {}
    aliases: dict[str, str] = {}
    seen: dict[object, str] = {}
    for name, tensor in tensors.items():
        entry = _entry(path, name, tensor, records)
        key = (entry.offset, entry.dtype, entry.shape, entry.stride)
        first = seen.setdefault(key, name) if entry.nbytes else name
        if first == name:
            entries[name] = entry
        else:
            aliases[name] = first
    return FileTensors(path, FileStamp.of(status), entries, aliases)


def _records(path: Path, descriptor: int) -> dict[int, int]:
    """Offset to size of every record that holds a storage."""
    found: dict[int, int] = {}
    # Thirty bytes per record are read all over the file: without this, each would pull in its neighbours.
    no_readahead(descriptor)
    try:
        with open(descriptor, "rb", closefd=False) as file, zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                record = info.filename.partition("/")[2]
                if record == "byteorder" and archive.read(info).decode() != sys.byteorder:
                    raise WeightsFormatError(
                        f"{path} was saved on a machine of the other byte order; save it again here"
                    )
                if not record.startswith("data/"):
                    continue
                if info.compress_type != zipfile.ZIP_STORED:
                    raise WeightsFormatError(
                        f"{path}: its record {info.filename!r} is compressed; save it with torch.save"
                    )
                local = read_exactly(descriptor, path, info.header_offset, _LOCAL_HEADER)
                drop_cache(descriptor, info.header_offset, _LOCAL_HEADER)
                names = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
                found[info.header_offset + _LOCAL_HEADER + names] = info.file_size
    except (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError, EOFError, ValueError) as error:
        if isinstance(error, NarrowboatError):
            raise
        raise WeightsFormatError(f"{path} is truncated or damaged: {error}") from error
    return found


def _load_skeleton(path: Path) -> object:
    """What the file's pickle describes, with every storage on the meta device."""
    try:
        return torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, KeyError, ... for damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsFormatError(
            f"{path} cannot be read as weights only: {reason} Save the state dict alone: "
            f"torch.save(model.state_dict(), path)"
        ) from error


def _flat_state_dict(path: Path, loaded: object) -> dict[str, torch.Tensor]:
    """Find the state dict: the loaded dict itself, or the one under a usual wrapper key."""
    while isinstance(loaded, Mapping):
        values: Mapping[Any, Any] = loaded
        if values and all(isinstance(value, torch.Tensor) for value in values.values()):
            return {str(name): tensor for name, tensor in values.items()}
        inner = next((values[key] for key in _WRAPPERS if isinstance(values.get(key), Mapping)), None)
        if inner is None:
            other = [f"{key!r} ({type(v).__name__})" for key, v in values.items() if not isinstance(v, torch.Tensor)]
            what = f"also holds {', '.join(other[:3])}" if other else "is empty"
            raise WeightsFormatError(
                f"{path} must hold tensors only (or a state dict under {', '.join(_WRAPPERS)}), and {what}"
            )
        loaded = inner
    raise WeightsFormatError(f"{path} holds a {type(loaded).__name__}, not a state dict")


def _entry(path: Path, name: str, tensor: torch.Tensor, records: Mapping[int, int]) -> TensorEntry:
    where = f"{path}: tensor {name!r}"
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise WeightsFormatError(f"{where} is sparse or quantized; only dense tensors can be streamed")
    if tensor.dtype not in SAFETENSORS_CODES:
        raise WeightsFormatError(f"{where} has the dtype {tensor.dtype}, which cannot be packed")
    if tensor.is_conj() or tensor.is_neg():
        raise WeightsFormatError(
            f"{where} is a lazy conjugate or negative; save it after resolve_conj().resolve_neg()"
        )
    shape, item = tuple(tensor.shape), tensor.dtype.itemsize
    nbytes = math.prod(shape) * item
    begin = _record_offset(path, name, tensor)
    if begin not in records:
        raise WeightsFormatError(f"{where} has no record in the archive: the file is damaged")
    stride = None if tensor.is_contiguous() else tuple(tensor.stride())
    entry = TensorEntry(name, tensor.dtype, shape, nbytes, path, begin + int(tensor.storage_offset()) * item, stride)
    if nbytes and entry.end > begin + records[begin]:
        raise WeightsFormatError(f"{where} reaches past the end of its record: the file is damaged")
    return entry


def _record_offset(path: Path, name: str, tensor: torch.Tensor) -> int:
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if offset is None:
        raise WeightsFormatError(
            f"{path}: tensor {name!r} has no bytes in the file: it was saved from the meta device, or this PyTorch "
            f"({torch.__version__}) cannot locate tensors; save the model with its weights, or use a newer PyTorch"
        )
    return int(offset)
