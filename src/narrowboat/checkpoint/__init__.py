"""Weights at rest: an index of the tensors in files, packing them for streaming, and their digests.

Nothing in this room loads a model. :func:`open_index` says where each tensor's bytes lie;
:func:`pack` writes them in execution order at page-aligned offsets, as plain safetensors;
:func:`verify` checks a packed file against its digests.
"""

from narrowboat.checkpoint.entry import FileStamp, TensorEntry
from narrowboat.checkpoint.index import WeightsIndex, open_index
from narrowboat.checkpoint.pack import PackReport, pack
from narrowboat.checkpoint.packed_format import PAGE
from narrowboat.checkpoint.verify import VerifyReport, verify

__all__ = [
    "PAGE",
    "FileStamp",
    "PackReport",
    "TensorEntry",
    "VerifyReport",
    "WeightsIndex",
    "open_index",
    "pack",
    "verify",
]
