"""What cannot be used is refused before anything is touched, with an error that says what, where and what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import narrowboat as nb
from narrowboat.errors import (
    BudgetError,
    ModelError,
    NarrowboatError,
    NoDeviceError,
    QuantityError,
    StreamedModelError,
    UsageError,
    WeightsError,
    WeightsFormatError,
    WeightsMismatchError,
    WeightsNotFoundError,
)


@pytest.mark.parametrize(
    "budget", ["12 apples", "", "MiB", "-3MiB", "1e9", float("nan"), float("inf"), 0, -5, 0.2, None, True, [1]]
)
def test_a_budget_that_is_no_size_is_refused(deep: Any, budget: Any) -> None:
    with pytest.raises(QuantityError, match="budget"):
        deep.stream(budget=budget)


@pytest.mark.parametrize("packed", [True, False])
def test_a_budget_too_small_carries_the_smallest_that_works(tmp_path: Path, deep: Any, packed: bool) -> None:
    path = deep.path
    if not packed:
        path = tmp_path / "w.pth"
        torch.save(deep.plain.state_dict(), path)
    with pytest.raises(BudgetError, match="smallest") as refused:
        deep.stream(path=path, budget="64KiB")
    minimum = refused.value.minimum
    assert refused.value.limiter in str(refused.value)
    with pytest.raises(BudgetError) as again:
        deep.stream(path=path, budget=minimum - 1)
    assert again.value.minimum == minimum
    model = deep.stream(path=path, budget=minimum)
    assert deep.right(model, 3)
    assert nb.session(model).min_budget <= minimum


def test_nothing_is_read_of_a_budget_that_is_refused(deep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(*args: Any) -> int:
        raise AssertionError("weights were read")

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(BudgetError):
        deep.stream(budget=1000)


@pytest.mark.parametrize("budget", ["4 MiB", "4.5mib", 5e6, "5000000", 5_000_000])
def test_sizes_as_people_write_them(deep: Any, budget: Any) -> None:
    assert deep.right(deep.stream(budget=budget), 1)


@pytest.mark.parametrize("device", ["meta", torch.device("meta"), "toaster", 7])
def test_a_device_that_is_not_supported_is_refused(deep: Any, device: Any) -> None:
    with pytest.raises(UsageError, match="cuda"):
        deep.stream(device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")])
def test_a_gpu_that_is_not_there_is_named_with_the_reason(deep: Any, device: Any) -> None:
    with pytest.raises(NoDeviceError, match=r"'cuda(:0)?' cannot be used: torch .* is built without CUDA|no driver"):
        deep.stream(device=device)


def test_no_such_file(deep: Any, tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match=r"missing\.safetensors"):
        deep.stream(path=tmp_path / "missing.safetensors")


def test_a_folder_without_weights(deep: Any, tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match=r"model\.safetensors"):
        deep.stream(path=tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(deep: Any, tmp_path: Path) -> None:
    path = deep.copy(tmp_path / "w.safetensors")
    path.chmod(0)
    with pytest.raises(WeightsNotFoundError, match="permission"):
        deep.stream(path=path)


@pytest.mark.parametrize("keep", [0, 7, 100, 5000, -4096, -1])
def test_a_truncated_file(deep: Any, tmp_path: Path, keep: int) -> None:
    path = deep.copy(tmp_path / "w.safetensors")
    size = path.stat().st_size
    os.truncate(path, keep if keep >= 0 else size + keep)
    with pytest.raises(WeightsFormatError, match=str(path)):
        deep.stream(path=path)


@pytest.mark.parametrize("content", [b"not weights at all", b"\xff" * 4096, b"PK\x03\x04garbage"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".weights"])
def test_a_file_that_is_no_weights_file(deep: Any, tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=str(path)):
        deep.stream(path=path)


def rewrite_header(path: Path, change: Any) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize("field", ["dtype", "nan", "negative", "overlong"])
def test_a_header_that_makes_no_sense(deep: Any, tmp_path: Path, field: str) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "w.safetensors"
    save_file(deep.plain.state_dict(), path)

    def change(header: dict[str, Any]) -> None:
        entry = header["head.weight"]
        if field == "dtype":
            entry["dtype"] = "F99"
        elif field == "nan":
            entry["shape"] = [float("nan"), 256]
        elif field == "negative":
            entry["data_offsets"] = [-4, 4]
        else:
            entry["data_offsets"][1] = 1 << 60

    rewrite_header(path, change)
    with pytest.raises(WeightsFormatError, match=str(path)):
        deep.stream(path=path)


def test_another_models_weights_are_one_error_that_lists_everything(deep: Any) -> None:
    class Other(deep.net):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(3, 3)
            self.head = nn.Linear(256, 11)
            self.layers[1].fc = nn.Linear(256, 256, dtype=torch.float16)
            self.layers[3].fc = nn.Linear(256, 256, bias=False)

    with pytest.raises(WeightsMismatchError) as refused:
        deep.stream(Other)
    text = str(refused.value)
    for part in (
        "missing from the file: extra.weight; extra.bias",
        "in the file but not in the model: layers.3.fc.bias",
        "head.weight: the model has [11, 256], the file [10, 256]",
        "layers.1.fc.weight: the model has float16, the file float32",
        str(deep.path),
    ):
        assert part in text


def test_tensors_the_model_does_not_have_are_allowed_if_said_so(deep: Any) -> None:
    class Shorter(deep.net):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__(depth=4)

    with pytest.raises(WeightsMismatchError, match="not in the model"):
        deep.stream(Shorter)
    plain = Shorter().eval()
    plain.load_state_dict(deep.plain.state_dict(), strict=False)
    model = deep.stream(Shorter, strict=False)
    with torch.inference_mode():
        assert torch.equal(model(deep.x), plain(deep.x))


@pytest.mark.parametrize("example", ["abc", 3, torch.zeros(2, 256)])
def test_an_example_that_is_no_tuple_or_dict(deep: Any, example: Any) -> None:
    with pytest.raises(UsageError, match="example"):
        deep.stream(example=example)


def test_an_example_that_does_not_fit_is_refused_or_done_without(deep: Any) -> None:
    try:
        model = deep.stream(example=(torch.zeros(2, 3),))
    except ModelError:
        return
    assert deep.right(model, 3)


@pytest.mark.parametrize("factory", [lambda: None, lambda: 1 / 0, "net", 7])
def test_a_factory_that_makes_no_module(deep: Any, factory: Any) -> None:
    with pytest.raises((ModelError, UsageError)):
        deep.stream(factory)


@pytest.mark.parametrize("weights", [5, b"w.safetensors", "a\0b", ["w"]])
def test_weights_that_are_no_path(deep: Any, weights: Any) -> None:
    with pytest.raises(NarrowboatError):
        nb.stream(deep.net, weights, budget=deep.minimum, example=(deep.x,))


def test_a_factory_or_a_meta_module_needs_weights(deep: Any) -> None:
    with pytest.raises(UsageError, match="weights= is missing"):
        nb.stream(deep.net, budget=deep.minimum)
    with torch.device("meta"):
        module = deep.net()
    with pytest.raises(UsageError, match="weights= is missing"):
        nb.stream(module, budget=deep.minimum)


def test_an_offload_folder_that_is_a_file(deep: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NarrowboatError, match="file"):
        nb.stream(deep.net(), budget=deep.minimum, example=(deep.x,), offload_folder=tmp_path / "file")


def test_io_is_one_of_three(deep: Any) -> None:
    with pytest.raises(UsageError, match="auto"):
        deep.stream(io="fast")


@pytest.mark.parametrize("model", [nn.Linear(2, 2), 3, None])
def test_only_a_streamed_model_has_a_session(model: Any) -> None:
    with pytest.raises(StreamedModelError, match=r"nb\.stream"):
        nb.session(model)


def test_a_torchscript_module_is_refused(deep: Any) -> None:
    with torch.no_grad():
        script = torch.jit.trace(deep.plain, deep.x)
    with pytest.raises(ModelError, match="TorchScript"):
        deep.stream(script)
