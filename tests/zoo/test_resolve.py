"""MODEL and INPUT on the command line."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from narrowboat.errors import ModelError, UsageError
from narrowboat.zoo.resolve import load_input, resolve_model


def test_a_factory_is_found_with_its_example() -> None:
    model = resolve_model("narrowboat.zoo:resnet101")
    assert model.example is not None
    assert [tuple(tensor.shape) for tensor in model.example] == [(1, 3, 224, 224)]
    assert model.inputs(None) is model.example


def test_a_module_in_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models_here.py").write_text("import torch\ndef tiny():\n    return torch.nn.Linear(2, 2)\n")
    monkeypatch.chdir(tmp_path)
    model = resolve_model("models_here:tiny")
    assert isinstance(model.factory(), torch.nn.Linear)
    assert model.example is None
    assert model.inputs(None) is None


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("resnet101", "package.module:factory"),
        ("narrowboat.zoo:", "package.module:factory"),
        (":resnet101", "package.module:factory"),
        ("narrowboat.zoo:resnet102", "did you mean 'resnet101'"),
        ("narrowboat.menagerie:resnet101", "no module 'narrowboat.menagerie'"),
        ("no_such_package.zoo:x", "no module 'no_such_package.zoo'"),
        ("..zoo:x", "no module name"),
        ("narrowboat:__version__", "is a str"),
    ],
)
def test_a_wrong_model_is_a_usage_error_that_says_why(spec: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        resolve_model(spec)


def test_a_folder_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import narrowboat_no_such_package", "needs the module 'narrowboat_no_such_package'"),
        ("def f(): ...\ndef boom():\n    raise OSError('gone')\nf.example_inputs = boom", "gone"),
    ],
)
def test_a_module_that_fails_is_a_model_error(
    source: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    name = f"failing_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=says):
        resolve_model(f"{name}:f")


def test_an_image_is_resized_to_the_example_and_normalised(tmp_path: Path) -> None:
    path = tmp_path / "grey.png"
    Image.new("L", (40, 30), 255).save(path)
    tensor = load_input(path, (torch.zeros(1, 3, 8, 6),), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    assert tensor.shape == (1, 3, 8, 6)
    assert tensor.is_contiguous()
    assert torch.allclose(tensor, torch.full_like(tensor, 2.0))


def test_without_an_example_an_image_keeps_its_size(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "black.jpg")
    assert load_input(tmp_path / "black.jpg", None).shape == (1, 3, 30, 40)


def test_an_array_takes_the_examples_float_type_and_keeps_integers(tmp_path: Path) -> None:
    numpy.save(tmp_path / "floats.npy", numpy.asfortranarray(numpy.arange(6.0).reshape(2, 3)).astype(">f8"))
    floats = load_input(tmp_path / "floats.npy", (torch.zeros(1, dtype=torch.float32),))
    assert floats.dtype == torch.float32
    assert torch.equal(floats, torch.arange(6.0).reshape(2, 3))
    numpy.save(tmp_path / "ids.npy", numpy.arange(4))
    assert load_input(tmp_path / "ids.npy", (torch.zeros(1),)).dtype == torch.int64


def test_a_read_input_replaces_the_first_argument_only(tmp_path: Path) -> None:
    (tmp_path / "two_inputs.py").write_text(
        "import torch\ndef f(): ...\nf.example_inputs = lambda: (torch.zeros(2), 'mode')\n"
    )
    numpy.save(tmp_path / "x.npy", numpy.ones(2, dtype="float32"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        first, second = resolve_model("two_inputs:f").inputs(tmp_path / "x.npy") or ()
    assert torch.equal(first, torch.ones(2))
    assert second == "mode"


@pytest.mark.parametrize("content", [b"", b"neither", b"\x93NUMPY"])
@pytest.mark.parametrize("name", ["input.npy", "input.png"])
def test_an_input_that_is_neither_is_a_usage_error(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=name):
        load_input(tmp_path / name, None)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    numpy.save(tmp_path / "objects.npy", numpy.array([object()], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match="array of numbers"):
        load_input(tmp_path / "objects.npy", None)


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.png"):
        load_input(tmp_path / "gone.png", None)
