"""Several threads on one streamed model: every answer is plain PyTorch's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

import narrowboat as nb
from narrowboat.errors import StreamedModelError


def together(*calls: Callable[[], None]) -> None:
    """Run each call in a thread of its own; fail with what the first of them met, or if one never ends."""
    met: list[BaseException] = []

    def guarded(call: Callable[[], None]) -> None:
        try:
            with torch.inference_mode():
                call()
        except BaseException as error:
            met.append(error)

    threads = [threading.Thread(target=guarded, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if met:
        raise met[0]


def test_four_threads_with_inputs_of_their_own(deep: Any) -> None:
    model = deep.stream()
    inputs = [torch.randn(n, 256) for n in (1, 2, 3, 5)]
    with torch.inference_mode():
        wanted = [deep.plain(x) for x in inputs]

    def caller(i: int) -> Callable[[], None]:
        def call() -> None:
            for _ in range(8):
                assert torch.equal(model(inputs[i]), wanted[i])

        return call

    together(*map(caller, range(4)))
    assert nb.session(model).stats()["passes"] == 32


def test_threads_that_run_parts_while_others_run_the_whole(deep: Any) -> None:
    model = deep.stream(budget=deep.minimum + (1 << 20))
    with torch.inference_mode():
        parts = [layer.fc(deep.x) for layer in deep.plain.layers]

    def whole() -> None:
        for _ in range(10):
            assert torch.equal(model(deep.x), deep.want)

    def part(i: int) -> Callable[[], None]:
        def call() -> None:
            for _ in range(10):
                assert torch.equal(model.layers[i].fc(deep.x), parts[i])

        return call

    together(whole, part(1), part(7), whole)


def test_a_thread_that_reads_weights_while_another_runs_gets_the_files_bytes(deep: Any) -> None:
    model = deep.stream()
    done = threading.Event()

    def whole() -> None:
        try:
            for _ in range(20):
                assert torch.equal(model(deep.x), deep.want)
        finally:
            done.set()

    def read() -> None:
        while not done.is_set():
            for ours, plain in zip(model.layers, deep.plain.layers, strict=True):
                try:
                    assert torch.equal(ours.fc.weight.clone(), plain.fc.weight)
                except StreamedModelError:
                    continue

    together(whole, read)


def test_two_models_of_one_file_in_two_threads(deep: Any) -> None:
    models = [deep.stream(), deep.stream(budget=deep.minimum + (1 << 20))]

    def caller(model: Any) -> Callable[[], None]:
        def call() -> None:
            for _ in range(10):
                assert torch.equal(model(deep.x), deep.want)

        return call

    together(*map(caller, models))


def test_opening_and_closing_sessions_while_another_runs(deep: Any) -> None:
    model = deep.stream()

    def whole() -> None:
        for _ in range(20):
            assert torch.equal(model(deep.x), deep.want)

    def open_and_close() -> None:
        for _ in range(5):
            other = nb.stream(deep.net, deep.path, budget=64 << 20, example=(deep.x,)).eval()
            with nb.session(other):
                assert torch.equal(other(deep.x), deep.want)

    together(whole, open_and_close)
