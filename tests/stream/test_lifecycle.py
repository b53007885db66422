"""What a streamed model can and cannot do besides running: right, or an error with a name."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import narrowboat as nb
from narrowboat.errors import (
    ForeignHooksError,
    GradientError,
    NarrowboatError,
    SessionClosedError,
    StreamedModelError,
)

MIB = 1 << 20


@pytest.fixture(params=["streamed", "resident"])
def model(request: pytest.FixtureRequest, deep: Any) -> Any:
    """A streamed model that has run once, with its weights on the move or all in their resident places."""
    made = deep.stream(budget=deep.minimum if request.param == "streamed" else 64 * MIB)
    assert bool(nb.session(made).plan.streamed) == (request.param == "streamed")
    assert deep.right(made, 1)
    return made


def save_whole(model: nn.Module) -> None:
    torch.save(model, io.BytesIO())


REFUSED: dict[str, Callable[[Any], Any]] = {
    "deepcopy of the model": copy.deepcopy,
    "deepcopy of a part": lambda m: copy.deepcopy(m.layers),
    "pickle": pickle.dumps,
    "torch.save of the whole model": save_whole,
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "to(float16)": lambda m: m.to(torch.float16),
    "to(meta)": lambda m: m.to("meta"),
    "half of a part": lambda m: m.layers[2].half(),
    "share_memory": lambda m: m.share_memory(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_need_all_the_bytes_is_refused_by_name_and_changes_nothing(
    model: Any, deep: Any, name: str
) -> None:
    with pytest.raises(StreamedModelError, match="streamed"):
        REFUSED[name](model)
    assert deep.right(model, 2)
    deep.assert_state(model.state_dict())


@pytest.mark.parametrize("write", ["zero_", "data", "copy_", "init"])
def test_a_weight_that_is_out_cannot_be_written(deep: Any, write: str) -> None:
    model = deep.stream()
    weight = model.layers[5].fc.weight
    with pytest.raises(StreamedModelError, match=r"layers\.5\.fc\.weight.*cannot be written"), torch.no_grad():
        if write == "zero_":
            weight.zero_()
        elif write == "data":
            weight.data = torch.zeros(256, 256)
        elif write == "copy_":
            weight.detach().copy_(torch.zeros(256, 256))
        else:
            nn.init.zeros_(weight)
    assert deep.right(model)


def test_moving_to_where_it_is_changes_nothing(model: Any, deep: Any) -> None:
    assert model.to("cpu") is model
    assert model.to(torch.float32) is model
    assert model.cpu().float().train().eval().requires_grad_(False) is model
    assert deep.right(model)


def test_state_dict_holds_the_files_bytes_at_any_time(model: Any, deep: Any) -> None:
    early = model.state_dict()
    assert deep.right(model, 2)
    deep.assert_state(early)
    deep.assert_state(model.state_dict())


def test_saving_the_state_dict_writes_the_files_bytes(model: Any, deep: Any) -> None:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    deep.assert_state(torch.load(file))
    assert deep.right(model)


def test_loading_a_state_dict_is_refused_or_takes_effect(model: Any, deep: Any) -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in deep.plain.state_dict().items()}
    try:
        model.load_state_dict(zeros)
    except (StreamedModelError, RuntimeError) as error:
        assert "streamed" in str(error)
        assert deep.right(model)
    else:
        with torch.inference_mode():
            assert torch.count_nonzero(model(deep.x)) == 0


def test_a_kept_parameter_is_right_as_long_as_the_session_lives(model: Any, deep: Any) -> None:
    parameter, expected = model.layers[4].fc.weight, deep.plain.layers[4].fc.weight
    assert isinstance(parameter, nn.Parameter)
    assert parameter is model.layers[4].fc.weight
    assert torch.equal(parameter, expected)
    assert deep.right(model)
    assert parameter is model.layers[4].fc.weight
    assert torch.equal(parameter.detach(), expected)
    assert parameter.detach().numpy().tobytes() == expected.detach().numpy().tobytes()
    assert parameter.tolist() == expected.tolist()
    assert float(parameter.sum()) == float(expected.sum())


def test_a_weak_reference_to_a_parameter_does_no_harm(model: Any, deep: Any) -> None:
    reference = weakref.ref(model.layers[3].norm.weight)
    assert deep.right(model, 2)
    assert reference() is model.layers[3].norm.weight


VIEWS: dict[str, Callable[[torch.Tensor], Any]] = {
    "slice": lambda w: w[3:9],
    "transpose": lambda w: w.t(),
    "flat": lambda w: w.view(-1),
    "detached": lambda w: w.detach(),
    "data": lambda w: w.data,
    "numpy": lambda w: w.detach().numpy(),
    "dlpack": lambda w: torch.from_dlpack(w.detach()),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_taken_while_the_weight_was_in_keeps_its_bytes(model: Any, deep: Any, name: str) -> None:
    kept = []
    for layer in model.layers:
        layer.fc.register_forward_hook(lambda module, _, __: kept.append(VIEWS[name](module.weight)))
    assert deep.right(model, 1)
    first, kept = kept, []

    def wrong() -> list[int]:
        return [
            i
            for i, layer in enumerate(deep.plain.layers)
            if not torch.equal(
                torch.as_tensor(first[i]), VIEWS["detached"](torch.as_tensor(VIEWS[name](layer.fc.weight)))
            )
        ]

    assert wrong() == []
    assert deep.right(model, 2)
    assert wrong() == []
    nb.session(model).close()
    assert wrong() == []


def test_outputs_that_are_views_of_weights_survive_the_next_passes(deep: Any) -> None:
    class Leaky(deep.net):  # type: ignore[name-defined, misc]
        def forward(self, x: torch.Tensor) -> Any:
            super().forward(x)
            return self.layers[3].fc.weight[2:4], self.layers[6].fc.weight.t(), self.layers[8].norm.weight.detach()

    model = deep.stream(Leaky, budget=deep.least(Leaky, deep.path, deep.x))
    layers = deep.plain.layers
    expected = (layers[3].fc.weight[2:4], layers[6].fc.weight.t(), layers[8].norm.weight)
    with torch.no_grad():
        answers = [model(deep.x) for _ in range(3)]
    for answer in answers:
        assert [torch.equal(got, want) for got, want in zip(answer, expected, strict=True)] == [True] * 3


@pytest.mark.parametrize("extra", [0, MIB, 64 * MIB])
def test_parts_run_alone_in_any_order(deep: Any, extra: int) -> None:
    model = deep.stream(budget=deep.minimum + extra)
    with torch.no_grad():
        for i in (9, 3, 7, 0, 5):
            ours, plain = model.layers[i], deep.plain.layers[i]
            assert torch.equal(ours(deep.x), plain(deep.x))
            assert torch.equal(ours.fc(deep.x), plain.fc(deep.x))
            assert torch.equal(F.linear(deep.x, ours.fc.weight), F.linear(deep.x, plain.fc.weight))
    assert deep.right(model, 3)


@pytest.mark.parametrize("extra", [0, MIB, 64 * MIB])
def test_passes_that_leave_the_traced_order_stay_right(deep: Any, extra: int) -> None:
    orders = {
        "as traced": lambda layers: layers,
        "backwards": lambda layers: layers[::-1],
        "some again": lambda layers: layers[:4] + layers[2:6],
        "one thrice": lambda layers: [layers[7]] * 3 + layers[::2],
        "early exit": lambda layers: layers[:1],
        "none": lambda layers: [],
    }

    class Branching(deep.net):  # type: ignore[name-defined, misc]
        order = "as traced"

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in orders[self.order](list(self.layers)):
                x = layer(x)
            return self.head(x)

    plain = Branching().eval()
    plain.load_state_dict(deep.plain.state_dict())
    model = deep.stream(Branching, budget=deep.minimum + extra)
    with torch.inference_mode():
        for order in [*orders, "early exit", "backwards", "as traced", "as traced", "none", "as traced"]:
            plain.order = model.order = order
            assert torch.equal(model(deep.x), plain(deep.x)), order
    assert nb.session(model).stats()["off_trace_passes"] >= 5


def test_a_part_called_from_a_hook_of_another_part(deep: Any) -> None:
    def add_hook(net: Any) -> None:
        net.layers[3].register_forward_hook(lambda module, args, out: out + net.layers[7](out) * 0.5)

    class Hooked(deep.net):  # type: ignore[name-defined, misc]
        pass

    plain = Hooked().eval()
    plain.load_state_dict(deep.plain.state_dict())
    add_hook(plain)
    model = deep.stream(Hooked)
    add_hook(model)
    with torch.inference_mode():
        want = plain(deep.x)
        assert all(torch.equal(model(deep.x), want) for _ in range(3))


def test_the_whole_model_called_again_from_inside_itself(deep: Any) -> None:
    model = deep.stream()
    inner: list[torch.Tensor] = []

    def again() -> None:
        model.before = {}
        inner.append(model(deep.x))

    for _ in range(3):
        model.before = {4: again}
        assert deep.right(model, 1)
    assert all(torch.equal(answer, deep.want) for answer in inner)


def test_a_call_that_asks_for_gradients_is_pointed_to_training(deep: Any) -> None:
    model = deep.stream()
    with pytest.raises(GradientError, match="train_step"):
        model(deep.x)
    assert deep.right(model)


def test_gradients_of_the_input_through_frozen_weights_are_right(deep: Any) -> None:
    class Frozen(deep.net):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.requires_grad_(False)

    plain = Frozen().eval()
    plain.load_state_dict(deep.plain.state_dict())
    model = deep.stream(Frozen)
    gradients = []
    for net in (plain, model, model):
        x = deep.x.clone().requires_grad_()
        net(x).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_requires_grad_is_what_the_plain_parameter_has(deep: Any) -> None:
    class PartlyFrozen(deep.net):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers[2].requires_grad_(False)

    model = deep.stream(PartlyFrozen)
    flags = [(name, p.requires_grad) for name, p in PartlyFrozen().named_parameters()]
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == flags
    assert deep.right(model, 2)
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == flags


@pytest.mark.parametrize("extra", [0, MIB, 64 * MIB])
@pytest.mark.parametrize("traced_in", ["train", "eval"])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_running_statistics_survive_train_mode_or_are_refused(
    tmp_path: Path, deep: Any, extra: int, traced_in: str, kind: Any
) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = kind(64, track_running_stats=True)
            self.layers = nn.ModuleList([nn.Linear(256, 256) for _ in range(5)])
            self.train(traced_in == "train")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(x)
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    x = torch.randn(2, 64, 256)
    plain = Normed()
    before = copy.deepcopy(plain)
    nb.pack(plain.state_dict(), tmp_path / "w.safetensors")
    budget = deep.least(Normed, tmp_path / "w.safetensors", x) + extra
    model = nb.stream(Normed, tmp_path / "w.safetensors", budget=budget, example=(x,))
    deep.opened.append(model)
    refused = False
    with torch.no_grad():
        for i in range(4):
            try:
                got = model.train()(x + i)
            except StreamedModelError:
                refused = True
                break
            assert torch.equal(got, plain.train()(x + i))
        same = before if refused else plain
        assert torch.equal(model.norm.running_mean, same.norm.running_mean)
        assert torch.equal(model.norm.running_var, same.norm.running_var)
        assert torch.equal(model.eval()(x), same.eval()(x))


def test_two_sessions_of_one_file_do_not_disturb_each_other(deep: Any) -> None:
    small, large = deep.stream(), deep.stream(budget=64 * MIB)
    for _ in range(3):
        assert deep.right(small, 1)
        assert deep.right(large, 1)
    nb.session(small).close()
    assert deep.right(large)


def test_a_second_session_is_not_taken_for_an_overrun_of_the_first(tmp_path: Path, deep: Any) -> None:
    def factory() -> Any:
        return deep.net(20, 512)

    nb.pack(factory().state_dict(), tmp_path / "w.safetensors")
    x = torch.randn(2, 512)
    first = deep.stream(factory, tmp_path / "w.safetensors", budget=18 * MIB, example=(x,))
    reserved = nb.session(first).plan.fixed_bytes
    second = deep.stream(factory, tmp_path / "w.safetensors", budget=10 * MIB, example=(x,))
    with torch.inference_mode():
        for _ in range(4):
            first(x)
            second(x)
    assert nb.session(first).plan.fixed_bytes == reserved
    assert nb.session(first).prepared.corrections == {}


def test_a_model_is_streamed_only_once(deep: Any) -> None:
    model = deep.stream()
    with pytest.raises(StreamedModelError, match="streamed already"):
        nb.stream(model, deep.path, budget=deep.minimum, example=(deep.x,))
    assert deep.right(model)


def test_leaving_the_session_closes_it(deep: Any) -> None:
    model = deep.stream()
    with nb.session(model) as session:
        assert deep.right(model)
        assert not session.closed
    assert session.closed
    session.close()
    assert "closed" in repr(session)
    assert session.stats()["passes"] == 2


def test_everything_after_close_says_that_it_is_closed(model: Any, deep: Any) -> None:
    state = model.state_dict()
    weight = model.layers[2].fc.weight
    nb.session(model).close()
    with torch.no_grad():
        for use in (
            lambda: model(deep.x),
            lambda: model.layers[1](deep.x),
            lambda: model.layers[1].fc(deep.x),
            lambda: weight + 1,
            lambda: model.state_dict()["head.weight"] + 1,
            lambda: float(model.scale.sum()),
        ):
            with pytest.raises(SessionClosedError, match=r"nb\.stream"):
                use()
    for name, tensor in state.items():
        try:
            assert torch.equal(tensor, deep.plain.state_dict()[name])
        except SessionClosedError:
            continue


def test_a_closed_model_can_be_streamed_again(deep: Any) -> None:
    model = deep.stream()
    assert deep.right(model)
    nb.session(model).close()
    try:
        deep.stream(model)
    except StreamedModelError as error:
        assert "close its session first" not in str(error), "it is closed"
    else:
        assert deep.right(model, 3)


def test_close_in_the_middle_of_a_pass_ends_it_with_a_named_error(deep: Any) -> None:
    model = deep.stream()
    assert deep.right(model)
    model.before = {4: lambda: nb.session(model).close()}
    for _ in range(2):
        with pytest.raises(SessionClosedError), torch.inference_mode():
            model(deep.x)


def test_close_from_another_thread_ends_the_passes_of_this_one(deep: Any) -> None:
    model = deep.stream()
    met: list[BaseException] = []
    running = threading.Event()

    def call_for_ever() -> None:
        try:
            while True:
                assert deep.right(model, 1)
                running.set()
        except BaseException as error:
            met.append(error)

    thread = threading.Thread(target=call_for_ever, daemon=True)
    thread.start()
    assert running.wait(20)
    nb.session(model).close()
    thread.join(20)
    assert not thread.is_alive()
    assert isinstance(met[0], SessionClosedError)


def test_dropping_the_model_without_closing_frees_threads_and_files(deep: Any) -> None:
    gc.collect()
    threads = threading.active_count()
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        model = nb.stream(deep.net, deep.path, budget=64 * MIB, example=(deep.x,)).eval()
        assert deep.right(model, 1)
        reference = weakref.ref(model)
        del model
        gc.collect()
        assert reference() is None
    for thread in threading.enumerate():
        if thread.name.startswith("narrowboat-reader"):
            thread.join(5)
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= files


RSS_CHILD = """
import sys, gc, time, torch, narrowboat as nb
from pathlib import Path
from narrowboat.machine.memory import process_memory
from torch import nn
torch.set_num_threads(1)
path = Path(sys.argv[1])
def factory():
    return nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(10)])
x = torch.zeros(1, 1024)
nb.pack(factory().state_dict(), path)
def open_and_run():
    model = nb.stream(factory, path, budget="200MiB", example=(x,))
    with torch.inference_mode():
        model(x)
    return model
nb.session(open_and_run()).close()
gc.collect()
before = process_memory().rss
model = open_and_run()
during = process_memory().rss
nb.session(model).close()
closed = process_memory().rss
model = open_and_run()
del model
gc.collect()
for _ in range(50):  # a reader thread may let go of the arena a moment later
    if process_memory().rss - before < 8 << 20:
        break
    time.sleep(0.1)
print((during - before) >> 20, (closed - before) >> 20, (process_memory().rss - before) >> 20)
"""


def test_closing_and_dropping_give_the_memory_back_to_the_system(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", RSS_CHILD, str(tmp_path / "w.safetensors")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "1"},
    )
    held, closed, dropped = map(int, child.stdout.split())
    assert held >= 36
    assert closed <= 8
    assert dropped <= 8


def test_a_forked_child_gets_an_error_instead_of_waiting(deep: Any) -> None:
    model = deep.stream()
    assert deep.right(model)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)
        try:
            os._exit(0 if deep.right(model, 1) else 3)
        except NarrowboatError:
            os._exit(0)
        except BaseException:
            os._exit(4)
    _, status = os.waitpid(child, 0)
    assert not os.WIFSIGNALED(status), "the child waited for reader threads that it does not have"
    assert os.WEXITSTATUS(status) == 0
    assert deep.right(model)


def test_a_materialised_module_goes_through_the_offload_folder(tmp_path: Path, deep: Any) -> None:
    module = deep.net().eval()
    module.load_state_dict(deep.plain.state_dict())
    model = nb.stream(module, budget=deep.minimum, example=(deep.x,), offload_folder=tmp_path / "offload")
    assert model is module
    assert len(list((tmp_path / "offload").iterdir())) == 1
    assert deep.right(model, 3)
    nb.session(model).close()
    assert list((tmp_path / "offload").iterdir()) == []


def test_a_refused_budget_leaves_a_materialised_module_as_it_was(tmp_path: Path, deep: Any) -> None:
    module = deep.net().eval()
    module.load_state_dict(deep.plain.state_dict())
    with pytest.raises(nb.BudgetError):
        nb.stream(module, budget=1000, example=(deep.x,), offload_folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert deep.right(module)
    deep.assert_state(module.state_dict())


def test_a_model_under_accelerates_hooks_is_refused_with_the_call_that_removes_them(deep: Any) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    module = deep.net()
    hooks.add_hook_to_module(module.layers[0], hooks.ModelHook())
    with pytest.raises(ForeignHooksError, match="remove_hook_from_module"):
        nb.stream(module, deep.path, budget=deep.minimum, example=(deep.x,))
    hooks.remove_hook_from_module(module, recurse=True)
    assert deep.right(deep.stream(module))


@pytest.mark.parametrize("at", [0, 5, 9])
def test_a_write_through_a_view_takes_effect_or_is_reported(model: Any, deep: Any, at: int) -> None:
    changed = copy.deepcopy(deep.plain)
    with torch.inference_mode(False), torch.no_grad():
        changed.layers[at].fc.weight[0] = 1.0
        reported = False
        try:
            model.layers[at].fc.weight[0] = 1.0
        except StreamedModelError:
            reported = True
        for _ in range(3):
            try:
                answer = model(deep.x)
            except StreamedModelError as error:
                assert f"layers.{at}.fc.weight" in str(error)
                reported = True
                continue
            assert torch.equal(answer, deep.want if reported else changed(deep.x))


def test_a_module_that_cannot_be_streamed_is_left_whole(deep: Any) -> None:
    module = deep.net().eval()
    module.load_state_dict(deep.plain.state_dict())
    graph = module(deep.x)  # a graph that refers to the parameters
    try:
        model = deep.stream(module)
    except NarrowboatError:
        assert deep.right(module)
        deep.assert_state(module.state_dict())
    else:
        assert deep.right(model)
    assert graph.requires_grad
