"""Model folders: the right class, the right names, and clear refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from narrowboat.errors import ModelError, WeightsFormatError, WeightsNotFoundError
from narrowboat.profile.pretrained import first_input, open_pretrained
from narrowboat.profile.skeleton import match_weights
from pretrained_kit import llama, t5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama(tmp_path / "llama", dtype=torch.bfloat16)
    return tmp_path / "llama"


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_class_dtype_and_generation_settings_are_the_folders(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"max_length": 33, "top_k": 7}))
    opened = open_pretrained(folder)
    assert type(opened.model).__name__ == "LlamaForCausalLM"
    assert not opened.model.training
    assert {p.dtype for p in opened.model.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in opened.model.parameters()} == {"meta"}
    assert torch.get_default_dtype() is torch.float32
    assert opened.model.generation_config.max_length == 33
    assert opened.model.generation_config.top_k == 7
    match_weights(opened.model, opened.index)


def test_tied_weights_stay_one_object(tmp_path: Path) -> None:
    t5(tmp_path / "t5")
    model = open_pretrained(tmp_path / "t5").model
    assert model.encoder.embed_tokens.weight is model.shared.weight


def test_a_file_of_the_body_alone_is_found_under_the_heads_names(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    whole = BertForMaskedLM(config)
    whole.save_pretrained(tmp_path / "whole")
    change_config(tmp_path / "whole", architectures=["BertModel"])
    opened = open_pretrained(tmp_path / "whole")
    assert "encoder.layer.0.attention.self.query.weight" in opened.index.entries
    headed = dict(whole.bert.state_dict(), **{k: v for k, v in whole.state_dict().items() if k.startswith("cls.")})
    from safetensors.torch import save_file

    change_config(tmp_path / "whole", architectures=["BertForMaskedLM"])
    (tmp_path / "whole" / "model.safetensors").unlink()
    save_file({k: v.clone() for k, v in headed.items()}, tmp_path / "whole" / "model.safetensors")
    opened = open_pretrained(tmp_path / "whole")
    assert match_weights(opened.model, opened.index, strict=False).weights


def mixtral(folder: Path, **changes: Any) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=12, vocab_size=50,
    )  # fmt: skip
    made = MixtralForCausalLM(config)
    made.save_pretrained(folder, **changes)
    return made


def test_experts_stored_one_by_one_make_up_the_stacks_of_the_model(tmp_path: Path) -> None:
    state = mixtral(tmp_path / "old", max_shard_size="40KB").state_dict()
    opened = open_pretrained(tmp_path / "old")
    matched = match_weights(opened.model, opened.index)
    assert len({entry.file for entry in opened.index.entries.values()}) > 2
    stacks = [weight for weight in matched.weights if weight.entry.pieces]
    assert {weight.name.rsplit(".", 1)[1] for weight in stacks} == {"gate_up_proj", "down_proj"}
    for weight in stacks:
        entry = weight.entry
        assert sum(piece.nbytes for piece in entry.pieces) == entry.nbytes
        data = b"".join(piece.file.read_bytes()[piece.offset :][: piece.nbytes] for piece in entry.pieces)
        assert torch.equal(torch.frombuffer(bytearray(data), dtype=entry.dtype).view(entry.shape), state[weight.name])
        row = entry.nbytes // entry.shape[0]
        part = b"".join(p.file.read_bytes()[p.offset :][: p.nbytes] for _, p in entry.cut(3 * row + 8, 5 * row))
        assert part == data[3 * row + 8 : 5 * row]


def test_experts_of_which_one_is_missing_or_other_than_the_rest_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    mixtral(tmp_path / "old")
    path = tmp_path / "old" / "model.safetensors"
    state = load_file(path)
    name = "model.layers.0.block_sparse_moe.experts.7.w1.weight"
    for other in (None, state[name][:-1].clone(), state[name].to(torch.bfloat16)):
        rest = {key: value for key, value in state.items() if key != name or other is not None}
        save_file({**rest, **({} if other is None else {name: other})}, path)
        with pytest.raises(WeightsFormatError, match="save_original_format=False"):
            open_pretrained(tmp_path / "old")


def test_no_folder_no_config_and_no_weights_are_told_apart(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no folder"):
        open_pretrained(tmp_path / "missing")
    with pytest.raises(ModelError, match=r"no config\.json"):
        open_pretrained(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsNotFoundError, match="holds no weights"):
        open_pretrained(folder)


def test_a_broken_config_is_one_line(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be used") as caught:
        open_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_an_unknown_architecture_is_named(folder: Path) -> None:
    change_config(folder, model_type="nosuchmodel", architectures=["NoSuchForCausalLM"])
    with pytest.raises(ModelError, match="nosuchmodel"):
        open_pretrained(folder)


def test_code_in_the_folder_is_not_run_unless_trusted(folder: Path) -> None:
    ran = folder / "ran"
    (folder / "configuration_own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaConfig\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    change_config(folder, model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        open_pretrained(folder)
    assert not ran.exists()


def test_quantised_weights_are_refused(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(ModelError, match="quantised"):
        open_pretrained(folder)


def test_example_inputs_keep_within_the_positions(folder: Path) -> None:
    first = first_input(open_pretrained(folder), 2, 10_000)
    assert first is not None
    assert tuple(first.shape) == (2, 256)


def test_the_real_sentence_model_opens(tmp_path: Path) -> None:
    from narrowboat.zoo.bert import folder as minilm

    copy = tmp_path / "copy"
    shutil.copytree(minilm(), copy)
    opened = open_pretrained(copy)
    assert type(opened.model).__name__ == "BertModel"
    match_weights(opened.model, opened.index, strict=False)
