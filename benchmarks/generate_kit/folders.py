"""A decoder at rest, in every form that a subject wants: written once in a work folder, the same random weights."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import offload_state_dict
from safetensors.torch import load_file
from torch import nn

from generate_kit.airllm_site import airllm_model
from inference_kit.materials import empty_module
from narrowboat.checkpoint import open_index, pack
from narrowboat.machine.pagecache import drop_cached
from narrowboat.profile.order import execution_order
from narrowboat.zoo import MODELS
from narrowboat.zoo.folder import FolderModel
from narrowboat.zoo.llama import decoder
from narrowboat.zoo.save import random_tensor

SHARD = "500MB"


def tiny_llama() -> nn.Module:
    """A decoder of some 60 MB for ``--quick``."""
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
    return decoder(vocab_size=4000, num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=256, **shape)


DECODERS: dict[str, Callable[[], nn.Module]] = {"llama_1b": MODELS["llama_1b"], "tiny_llama": tiny_llama}


@dataclass(frozen=True, slots=True)
class Folders:
    """One decoder at rest.

    Attributes:
        name: of the decoder, in ``DECODERS``.
        plain: a Hugging Face folder as ``save_pretrained`` writes it, sharded.
        packed: the same folder, its weights packed by narrowboat in the order of use.
        arrays: what accelerate's ``disk_offload`` writes: one array file per tensor.
        layers: what AirLLM writes: one safetensors file per layer.
        scratch: for what a subject writes while it runs.
    """

    name: str
    plain: Path
    packed: Path
    arrays: Path
    layers: Path
    scratch: Path

    def shards(self) -> list[Path]:
        """The weights files of the plain folder."""
        return sorted(self.plain.glob("*.safetensors"))

    def packed_file(self) -> Path:
        """The one weights file of the packed folder."""
        return self.packed / "model.safetensors"

    def drop_caches(self) -> None:
        """Get every copy of the weights out of the page cache."""
        for folder in (self.plain, self.packed, self.arrays, self.layers, self.scratch):
            for path in folder.rglob("*"):
                if path.is_file():
                    drop_cached(path)


def folders(name: str, work: Path) -> Folders:
    """Where the folders of decoder ``name`` are, or will be."""
    at = {kind: work / f"{name}.{kind}" for kind in ("plain", "packed", "arrays", "layers", "scratch")}
    return Folders(name, **at)


def make_folders(made: Folders, *, arrays: bool, layers: bool) -> None:
    """Write what is not there yet; in a child process, because it computes."""
    if not made.plain.exists():
        _whole(made.plain, lambda part: _save_pretrained(made.name, part))
    if not made.packed.exists():
        _whole(made.packed, lambda part: _pack(made.plain, part))
    if arrays and not made.arrays.exists():
        _whole(made.arrays, lambda part: offload_state_dict(str(part), mapped(made).state_dict()))
    if layers and not made.layers.exists():
        _whole(made.layers, lambda part: _split(made.plain, part))


def _whole(folder: Path, write: Callable[[Path], Any]) -> None:
    """A folder appears whole or not at all."""
    part = folder.with_suffix(folder.suffix + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write(part)
    part.rename(folder)


def _save_pretrained(name: str, folder: Path) -> None:
    model: Any = empty_module(DECODERS[name])
    weights = {key: random_tensor(key, tensor, 0) for key, tensor in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    model.save_pretrained(folder, max_shard_size=SHARD)
    _save_tokenizer(folder)


def _save_tokenizer(folder: Path) -> None:
    """Bytes as tokens: AirLLM does not load a folder without a tokenizer; nobody uses it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(sorted(alphabet))}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    made.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)


def _pack(plain: Path, folder: Path) -> None:
    """As ``narrowboat pack FOLDER -o NEW/model.safetensors --model FOLDER``, and the small files beside it."""
    model = FolderModel(plain)
    pack(plain, folder / "model.safetensors", order=execution_order(model, model.index()))
    for path in plain.glob("*.json"):
        if path.name != "model.safetensors.index.json":
            shutil.copy(path, folder / path.name)


def _split(plain: Path, folder: Path) -> None:
    # Whether AirLLM can run here is told by its subject, with the error.
    with contextlib.suppress(Exception):
        airllm_model(plain, folder)


def mapped(made: Folders) -> nn.Module:
    """The model over the memory-mapped shards: nothing is copied, pages are read when touched."""
    module = empty_module(DECODERS[made.name])
    weights: dict[str, torch.Tensor] = {}
    for shard in made.shards():
        weights.update(load_file(shard))
    module.load_state_dict(weights, assign=True)
    return module


def weight_bytes(made: Folders) -> int:
    """Bytes of all tensors."""
    return open_index(made.plain).total_bytes


def bytes_per_token(made: Folders) -> int:
    """Bytes of weights that one token uses: everything, but of the table of token embeddings one row."""
    with torch.device("meta"):
        model: Any = DECODERS[made.name]()
    table = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is table
    return weight_bytes(made) - (0 if tied else table.nbytes - table.nbytes // table.shape[0])
