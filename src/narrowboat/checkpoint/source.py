"""The tensors to pack, each as a stream of its bytes: out of an index of files, or out of memory."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from narrowboat.checkpoint.dtypes import SAFETENSORS_CODES
from narrowboat.checkpoint.entry import TensorEntry
from narrowboat.checkpoint.files import CHUNK, drop_cache, opened, read_chunks
from narrowboat.checkpoint.index import WeightsIndex
from narrowboat.checkpoint.packed_format import PAD_PREFIX
from narrowboat.errors import UsageError, WeightsFormatError

MEMORY = Path("<memory>")


@dataclass(frozen=True, slots=True)
class Source:
    """Tensors to pack.

    Attributes:
        entries: canonical names to entries; of in-memory tensors file and offset say nothing.
        aliases: other names to canonical ones.
        digests: the digests the bytes must have, if the source is packed itself.
        chunks: yields a tensor's bytes in C order, in pieces that live until the next one.
        check_unchanged: raises WeightsChangedError if the source is no longer what was indexed.
    """

    entries: Mapping[str, TensorEntry]
    aliases: Mapping[str, str]
    digests: Mapping[str, str]
    chunks: Callable[[str], Iterator[memoryview]]
    check_unchanged: Callable[[], None]


@contextmanager
def file_source(index: WeightsIndex) -> Iterator[Source]:
    """The tensors of ``index`` as a source; its files stay open within the context."""
    buffer = bytearray(CHUNK)
    with ExitStack() as stack:
        descriptors = {path: stack.enter_context(opened(path))[0] for path in index.files}
        index.check_unchanged()  # the paths just opened are the files that were indexed

        def chunks(name: str) -> Iterator[memoryview]:
            entry = index.entries[name]
            descriptor = descriptors[entry.file]
            if entry.contiguous:
                yield from read_chunks(descriptor, entry.file, entry.offset, entry.nbytes, buffer)
            else:
                yield from _strided_chunks(descriptor, entry)

        yield Source(index.entries, index.aliases, index.digests, chunks, index.check_unchanged)
        for descriptor in descriptors.values():
            drop_cache(descriptor)


def _strided_chunks(descriptor: int, entry: TensorEntry) -> Iterator[memoryview]:
    """The bytes in C order of a tensor that lies transposed, expanded or sliced in its file.

    Its extent, and of the model nothing else, is mapped while it is copied.
    """
    if entry.nbytes == 0:
        return
    begin = entry.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    # A private writable mapping: torch warns about read-only buffers, and nobody writes to this one.
    with mmap.mmap(descriptor, entry.end - begin, access=mmap.ACCESS_COPY, offset=begin) as mapping:
        flat = torch.frombuffer(mapping, dtype=entry.dtype, offset=entry.offset - begin)
        view = flat.as_strided(entry.shape, entry.stride or ())
        yield from tensor_chunks(view)
        del flat, view  # the mapping cannot be closed while a tensor looks into it
    drop_cache(descriptor, begin, entry.end - begin)


@contextmanager
def memory_source(tensors: Mapping[str, torch.Tensor]) -> Iterator[Source]:
    """The tensors of a state dict as a source. Names of the same bytes are tied.

    Raises:
        UsageError: a value is not a tensor, or is on the meta device; a name is not text or is reserved.
        WeightsFormatError: a layout or dtype that cannot be packed.
    """
    entries: dict[str, TensorEntry] = {}
    aliases: dict[str, str] = {}
    seen: dict[object, str] = {}
    for name, tensor in tensors.items():
        if isinstance(name, str) and name.startswith(PAD_PREFIX):
            continue  # a packed file read by another library
        entry = _memory_entry(name, tensor)
        lazy = (tensor.is_conj(), tensor.is_neg())
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, entry.shape, tuple(tensor.stride()), lazy)
        first = seen.setdefault(key, name) if entry.nbytes else name
        if first == name:
            entries[name] = entry
        else:
            aliases[name] = first
    yield Source(entries, aliases, {}, lambda name: tensor_chunks(tensors[name]), lambda: None)


def _memory_entry(name: object, tensor: object) -> TensorEntry:
    if not isinstance(name, str) or name == "__metadata__":
        raise UsageError(f"{name!r} cannot be the name of a tensor")
    if not isinstance(tensor, torch.Tensor):
        raise UsageError(f"{name!r} is a {type(tensor).__name__}, not a tensor; leave it out of the weights")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise WeightsFormatError(f"tensor {name!r} is sparse or quantized; only dense tensors can be packed")
    if tensor.dtype not in SAFETENSORS_CODES:
        raise WeightsFormatError(f"tensor {name!r} has the dtype {tensor.dtype}, which safetensors cannot hold")
    if tensor.is_meta:
        raise UsageError(f"tensor {name!r} is on the meta device: it has no bytes to pack")
    shape = tuple(tensor.shape)
    return TensorEntry(name, tensor.dtype, shape, math.prod(shape) * tensor.dtype.itemsize, MEMORY, 0)


def tensor_chunks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of ``tensor`` in C order, at most ``CHUNK`` at a time; copies no more than that."""
    tensor = tensor.detach()
    nbytes = tensor.numel() * tensor.dtype.itemsize
    if nbytes == 0:
        return
    plain = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    if plain:
        flat = tensor.reshape(-1)
        step = CHUNK // tensor.dtype.itemsize
        for start in range(0, flat.numel(), step):
            piece = flat[start : start + step].cpu()
            yield piece.view(torch.uint8).numpy().data
    elif nbytes <= CHUNK or tensor.ndim == 0:
        piece = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).cpu()
        yield piece.view(torch.uint8).numpy().data
    else:
        rows = max(1, CHUNK * tensor.shape[0] // nbytes)
        for start in range(0, tensor.shape[0], rows):
            block = tensor[start : start + rows] if rows > 1 else tensor[start]
            yield from tensor_chunks(block)


def check_names(names: Iterable[str]) -> None:
    """Refuse names that a safetensors header cannot hold.

    Raises:
        WeightsFormatError: a name that is not valid text, or that stands for padding or metadata.
    """
    for name in names:
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise WeightsFormatError(f"tensor name {name!r} is not valid text") from None
        if name == "__metadata__" or name.startswith(PAD_PREFIX):
            raise WeightsFormatError(f"tensor name {name!r} is reserved")
