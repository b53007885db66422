"""Small model folders that talk, and gateways that answer for them."""

from __future__ import annotations

import asyncio
import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from narrowboat.errors import BeyondContractError, JobFailedError, NoSuchTaskError, RequestError
from narrowboat.serve.interface import Reply, TaskFace
from narrowboat.serve.openai.errors import error_body
from narrowboat.serve.openai.jobs import Limits
from narrowboat.tasks.tensors import RawTensor, TensorSpec
from serve_kit import FakeGateway, raw, values

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "a narrowboat carries coal through the lock and the rain",
    "déjà vu in the café: naïve façades, jalapeños and 日本語 🚤",
    "every deadline is a promise that somebody has to keep",
] * 8
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}\n"
    "        {{ raise_exception('no such role: ' + message['role']) }}\n"
    "    {% endif %}\n"
    "<{{ message['role'] }}>{{ message['content'] | trim }}{{ eos_token }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(folder: Path, *, chat: bool = True) -> Any:
    """A byte-level tokenizer of up to 400 tokens with a chat template, saved beside the model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    made.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    if chat:
        fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return fast


def causal(folder: Path, kind: str = "llama", *, chat: bool = True, **changes: Any) -> Any:
    """Write a tiny causal model with its tokenizer; returns the plain model as transformers loads it."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

    common = {"vocab_size": 400, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    wide = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    settings: dict[str, tuple[Any, dict[str, Any]]] = {
        "gpt2": (GPT2Config, {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}),
        "llama": (LlamaConfig, wide),
        "qwen2": (Qwen2Config, {**wide, "tie_word_embeddings": True}),
    }
    config, sizes = settings[kind]
    torch.manual_seed(5)
    made = AutoModelForCausalLM.from_config(config(**{**sizes, **common, **changes}))
    for parameter in made.parameters():  # far enough from uniform that tokens differ
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    made.save_pretrained(folder)
    tokenizer(folder, chat=chat)
    return aligned(AutoModelForCausalLM.from_pretrained(folder).eval())


def aligned(model: Any) -> Any:
    """The same model with each weight at an aligned address: kernels choose their path by that."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


VOCABULARY, WINDOW, WIDTH = 400, 48, 8


def text_face(name: str, folder: Path, **fields: Any) -> TaskFace:
    """A task that gives the logits behind one position."""
    usual: dict[str, Any] = {
        "inputs": (TensorSpec("input_ids", "INT64", (1, WINDOW)), TensorSpec("last", "INT64", (1,))),
        "outputs": (TensorSpec("0", "FP32", (1, VOCABULARY)),),
        "facts": {"text": "causal", "tokenizer": str(folder), "window": WINDOW},
    }
    return _face(name, {**usual, **fields})


def embedding_face(name: str, folder: Path, **fields: Any) -> TaskFace:
    """A task that embeds a text."""
    both = tuple(TensorSpec(given, "INT64", (1, WINDOW)) for given in ("input_ids", "attention_mask"))
    usual: dict[str, Any] = {
        "inputs": both,
        "outputs": (TensorSpec("0", "FP32", (1, WIDTH)),),
        "facts": {"text": "embedding", "tokenizer": str(folder), "window": WINDOW},
    }
    return _face(name, {**usual, **fields})


def _face(name: str, fields: Mapping[str, Any]) -> TaskFace:
    usual = {"model": f"text:{name}", "ready": True, "takes_requests": True, "guaranteed": True}
    times = {"bound": 8_000, "deadline": 20_000, "period": 20_000, "burst": 1}
    return TaskFace(name=name, **{**usual, **times, **fields})


class Speaker:
    """A network that says what it is told to, from the first position that it is asked about.

    Attributes:
        script: tokens, one after another; the last one again and again.
        rows: the tokens up to the position, of each job.
    """

    def __init__(self) -> None:
        self.script: list[int] = [5]
        self.rows: list[list[int]] = []
        self._first: int | None = None

    def say(self, script: list[int]) -> None:
        """From the next job on."""
        self.script, self._first, self.rows = script, None, []

    def __call__(self, inputs: Mapping[str, RawTensor]) -> list[RawTensor]:
        last = int(values(inputs["last"])[0])
        self._first = last if self._first is None else self._first
        self.rows.append(values(inputs["input_ids"])[0, : last + 1].tolist())
        logits = np.linspace(0, 1, VOCABULARY)
        logits[self.script[max(0, min(last - self._first, len(self.script) - 1))]] = 9
        return [raw("FP32", logits[None])]


def summed(inputs: Mapping[str, RawTensor]) -> list[RawTensor]:
    """An "embedding": the sum and the number of the tokens, and zeros."""
    ids, mask = values(inputs["input_ids"]), values(inputs["attention_mask"])
    return [raw("FP32", [[(ids * mask).sum(), mask.sum(), *[0] * (WIDTH - 2)]])]


class Talk:
    """A gateway with a task that speaks, one that embeds, and some that do neither, and a server for it.

    Attributes:
        gateway: a fake one.
        speaker: the network of task "talk".
        url: of the server, without a path.
        tokens: transformers' own tokenizer of both.
    """

    def __init__(self, folder: Path) -> None:
        self.tokens = tokenizer(folder)
        self.speaker = Speaker()
        faces = [
            text_face("talk", folder),
            text_face("mute", folder, ready=False, reason="not admitted"),
            embedding_face("embed", folder),
            _face("image", {"inputs": (TensorSpec("x", "FP32", (1, 4)),)}),
        ]
        self.gateway = FakeGateway(faces, {"talk": self.speaker, "embed": summed})
        self.url = ""

    def say(self, text: str, *, end: bool = True) -> list[int]:
        """Have the task answer that; its tokens."""
        script = self.tokens.encode(text, add_special_tokens=False)
        self.speaker.say([*script, 2] if end else script)
        return script


def app_of(gateway: Any, limits: Limits | None = None) -> Any:
    """The endpoints alone, with their errors."""
    import fastapi

    from narrowboat.serve.openai.routes import router

    app = fastapi.FastAPI()
    app.include_router(router(gateway, limits))

    @app.exception_handler(RequestError)
    async def refused(_: Any, error: RequestError) -> fastapi.Response:
        wait = {} if error.retry_after is None else {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
        return fastapi.responses.JSONResponse(error_body(error), error.status, wait)

    return app


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The app behind uvicorn, on a port of its own; its URL."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off"))
    up = threading.Event()
    startup = server.startup

    async def started(sockets: Any = None) -> None:
        await startup(sockets)
        up.set()

    server.startup = started  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert up.wait(20)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


class LiveGateway:
    """What the endpoints need of a gateway, over a run in this process.

    Args:
        run: a ``LiveRun``.
        faces: of its tasks.
    """

    def __init__(self, run: Any, faces: list[TaskFace]) -> None:
        self._run, self._faces = run, {face.name: face for face in faces}
        self.refused = 0

    def faces(self) -> list[TaskFace]:
        """All tasks."""
        return list(self._faces.values())

    def face(self, name: str) -> TaskFace:
        """One of them."""
        if name not in self._faces:
            raise NoSuchTaskError(f"there is no task {name!r}")
        return self._faces[name]

    async def infer(
        self, name: str, inputs: Mapping[str, RawTensor], *, timeout: int | None = None, priority: int = 0
    ) -> Reply:
        """One job of the run."""
        import torch

        face = self.face(name)
        given = [torch.from_numpy(values(inputs[spec.name]).copy()) for spec in face.inputs]
        answer = await asyncio.wrap_future(self._run.submit(name, *given))
        if answer.outcome == "skipped" and (wait := re.search(r"may come in ([0-9.e-]+) s", answer.cause)):
            self.refused += 1
            raise BeyondContractError(answer.cause, retry_after=float(wait[1]))
        if answer.output is None:
            raise JobFailedError(f"{answer.outcome}: {answer.cause}")
        made = raw("FP32", answer.output.numpy())
        deadline = answer.due - answer.release
        return Reply(
            ((face.outputs[0], made),), answer.bound is not None, answer.bound, deadline, answer.response, answer.met
        )
