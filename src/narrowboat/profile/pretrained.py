"""A transformers model in a local folder: its class, its configuration, and its tensors under the model's own names.

Nothing is fetched and no code of the folder's is run, unless that is asked for. What ``from_pretrained`` does with the
weights is not needed: the module is built without storage for them, and they stay where they are.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from narrowboat.checkpoint import TensorEntry, WeightsIndex, open_index
from narrowboat.checkpoint.entry import Piece
from narrowboat.errors import ModelError, WeightsFormatError
from narrowboat.profile.skeleton import no_storage, tensor_names

log = logging.getLogger("narrowboat")
_AUTO = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")


@dataclass(frozen=True)
class Pretrained:
    """A model folder, opened; nothing of its weights is loaded.

    Attributes:
        folder: where it lies.
        config: the model's configuration.
        model: the skeleton, in ``eval()``, with the folder's generation settings.
        index: the weights at rest, under the model's names.
    """

    folder: Path
    config: Any
    model: nn.Module
    index: WeightsIndex


def open_pretrained(folder: str | Path, *, trust_remote_code: bool = False) -> Pretrained:
    """Open a Hugging Face folder.

    Args:
        folder: with ``config.json`` and weights, sharded or not.
        trust_remote_code: run the Python files that the folder brings, where its model needs them.

    Raises:
        ModelError: no folder, no configuration, an unknown architecture, one that needs the folder's own code, or
            quantised weights; transformers is not installed.
        WeightsNotFoundError: the folder has no weights.
        WeightsFormatError: its tensors are laid out as this architecture no longer has them.
    """
    path = Path(folder).expanduser()
    config = _read_config(path, trust_remote_code)
    index = open_index(path)
    stored = _float_dtype(index)
    kind = _model_class(config, path, trust_remote_code)
    try:
        with _default_dtype(stored), no_storage():
            model = kind._from_config(config) if hasattr(kind, "_from_config") else kind.from_config(config)
    except Exception as error:
        raise ModelError(f"{path}: {kind.__name__} cannot be built: {type(error).__name__}: {error}") from error
    model.tie_weights()
    model.eval()
    if (path / "generation_config.json").is_file() and hasattr(model, "generation_config"):
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return Pretrained(path, config, model, _under_model_names(index, model, path))


def first_input(opened: Pretrained, rows: int, length: int) -> torch.Tensor | None:
    """Zeros to run a model on: token numbers [rows, length], or pixels [rows, channels, size, size]; None if neither.

    Args:
        opened: the model folder.
        rows: samples.
        length: tokens of each; no more than the model has positions.
    """
    config, model = opened.config, opened.model
    name = getattr(model, "main_input_name", "input_ids")
    if name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        size = config.image_size
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        return torch.zeros(rows, getattr(config, "num_channels", 3), size, size, dtype=dtype)
    if name == "input_ids" and "input_ids" in inspect.signature(type(model).forward).parameters:
        return torch.zeros(rows, min(length, positions(config)), dtype=torch.long)
    return None


def positions(config: Any) -> int:
    """The most tokens of one sequence; a very large number where the configuration sets no limit."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_target_positions"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 1 << 30


def check_folder(path: Path) -> None:
    """Refuse what is no model folder.

    Raises:
        ModelError: no folder, or no ``config.json`` in it that is JSON.
    """
    if not path.is_dir():
        raise ModelError(f"{path} is no folder: give a local Hugging Face folder (nothing is downloaded)")
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json: it is no Hugging Face model folder")
    try:
        json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path / 'config.json'} cannot be used: {error}") from error


def _read_config(path: Path, trust_remote_code: bool) -> Any:
    check_folder(path)
    try:
        from transformers import AutoConfig, PretrainedConfig
    except ModuleNotFoundError as error:
        raise ModelError("model folders need transformers: pip install 'narrowboat[hf]'") from error
    try:
        raw, _ = PretrainedConfig.get_config_dict(path, local_files_only=True)
        if "auto_map" in raw and not trust_remote_code and not _is_known(raw.get("model_type")):
            raise ModelError(
                f"{path} needs the Python files it brings: read them, and if you trust them pass "
                "trust_remote_code=True (--trust-remote-code)"
            )
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except ModelError:
        raise
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path / 'config.json'} cannot be used: {first}") from error
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{path} holds quantised weights, which are not supported: use the unquantised ones")
    return config


def _is_known(model_type: Any) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def _model_class(config: Any, path: Path, trust_remote_code: bool) -> Any:
    import transformers

    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    remote = getattr(config, "auto_map", None) or {}
    for auto in _AUTO:
        kind = getattr(transformers, auto)
        if trust_remote_code and auto in remote:
            from transformers.dynamic_module_utils import get_class_from_dynamic_module

            return get_class_from_dynamic_module(remote[auto], str(path), local_files_only=True)
        if type(config) in kind._model_mapping:
            return kind._model_mapping[type(config)]
    named = ", ".join(getattr(config, "architectures", None) or ["none"])
    raise ModelError(f"{path / 'config.json'}: transformers has no model class for it (architectures: {named})")


def _float_dtype(index: WeightsIndex) -> torch.dtype:
    """The floating-point type that most bytes are stored in: the one the model is built in."""
    nbytes: Counter[torch.dtype] = Counter()
    for entry in index.entries.values():
        if entry.dtype.is_floating_point:
            nbytes[entry.dtype] += entry.nbytes
    return nbytes.most_common(1)[0][0] if nbytes else torch.get_default_dtype()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _under_model_names(index: WeightsIndex, model: Any, path: Path) -> WeightsIndex:
    """The index with its tensors renamed as ``from_pretrained`` would."""
    wanted = {name for _, names, _ in tensor_names(model).values() for name in names}
    rename = _renaming(model, wanted)
    found = {name: rename(name) for name in index.names()}
    parts: dict[str, dict[str, list[str]]] = {}  # a tensor of the model -> patterns -> what is stored of it
    converters: dict[str, Any] = {}
    for name, (new, converter, pattern) in found.items():
        if converter is not None and new in wanted:
            parts.setdefault(new, {}).setdefault(pattern, []).append(name)
            converters[new] = converter
    merged = {new: _merge(index, new, converters[new], stored, model, path) for new, stored in parts.items()}
    names = {name: new for name, (new, _, _) in found.items() if new not in merged}
    ignored = sorted(name for name, new in names.items() if new not in wanted)
    if ignored:
        log.info("%s holds %d tensors that the model does not use: %s", path, len(ignored), ", ".join(ignored[:5]))
    entries = {names[name]: replace(entry, name=names[name]) for name, entry in index.entries.items() if name in names}
    aliases = {names[name]: names[other] for name, other in index.aliases.items() if {name, other} <= names.keys()}
    digests = {names.get(name, name): digest for name, digest in index.digests.items()}
    if merged:  # pieces begin and end anywhere, and nobody has a digest of the whole
        return replace(index, entries={**entries, **merged}, aliases=aliases, digests={}, packed=False)
    return replace(index, entries=entries, aliases=aliases, digests=digests)


def _merge(
    index: WeightsIndex, new: str, converter: Any, stored: dict[str, list[str]], model: Any, path: Path
) -> TensorEntry:
    """The stack ``new`` of the model, of experts stored one by one: where its bytes lie, in their order.

    Args:
        stored: by pattern of the converter, the names that make it up.

    Raises:
        WeightsFormatError: transformers makes it in a way that is more than putting bytes one after the other.
    """
    operations = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
    lists = [sorted(stored.get(pattern, ()), key=_natural) for pattern in converter.source_patterns]
    columns = [[entry for name in names if (entry := index.resolve(name)) is not None] for names in lists]
    first = [column[0] for column in columns if column]
    plain = operations in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
    alike = len(first) == len(columns) and all(
        len(column) == len(columns[0]) and all(_alike(entry, column[0], first[0]) for entry in column)
        for column in columns
    )
    if not plain or not alike:
        name = next(name for names in stored.values() for name in names)
        raise WeightsFormatError(
            f"{path}: {name} is stored in an older layout, of which {type(model).__name__} makes {new} while it "
            "loads. Convert the folder once, on a machine with the memory for it: "
            f"{type(model).__name__}.from_pretrained(folder, dtype='auto')"
            ".save_pretrained(new_folder, save_original_format=False)"
        )
    pieces = tuple(Piece(e.file, e.offset, e.nbytes) for row in zip(*columns, strict=True) for e in row)
    shape = (len(columns[0]), sum(e.shape[0] for e in first), first[0].shape[1])
    nbytes = sum(piece.nbytes for piece in pieces)
    return TensorEntry(new, first[0].dtype, shape, nbytes, pieces[0].file, pieces[0].offset, pieces=pieces)


def _alike(entry: TensorEntry, column: TensorEntry, first: TensorEntry) -> bool:
    """Whether a matrix can lie beside the others of its kind, and beside the first of all."""
    matrix = len(entry.shape) == 2 and entry.contiguous and entry.shape == column.shape
    return matrix and entry.shape[1] == first.shape[1] and entry.dtype == first.dtype


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts names by their parts, numbers as numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _renaming(model: Any, wanted: set[str]) -> Any:
    """A function from a stored name to the model's, the converter that makes it of several, and what part of it."""
    prefix = getattr(model, "base_model_prefix", "") or ""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # before transformers 5, names differ by the prefix at most
        return lambda name: (_with_prefix(name, prefix, wanted), None, "")
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]

    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}

    def rename(name: str) -> tuple[str, Any, str]:
        if name in wanted:
            return name, None, ""
        new, pattern = rename_source_key(name, renamings, converters)
        return _with_prefix(new, prefix, wanted), of_pattern.get(pattern or ""), pattern or ""

    return rename


def _with_prefix(name: str, prefix: str, wanted: set[str]) -> str:
    """A headless file in a model with a head, and the other way round."""
    if name in wanted or not prefix:
        return name
    if f"{prefix}.{name}" in wanted:
        return f"{prefix}.{name}"
    return name.removeprefix(f"{prefix}.") if name.removeprefix(f"{prefix}.") in wanted else name
