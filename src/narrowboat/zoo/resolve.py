"""MODEL and INPUT on the command line: ``package.module:factory``, and an image or an array."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrowboat.errors import ModelError, NarrowboatError, UsageError
from narrowboat.zoo.folder import FolderModel
from narrowboat.zoo.model import IMAGENET_MEAN, IMAGENET_STD
from narrowboat.zoo.text import TextModel
from narrowboat.zoo.text_facts import parse_text

if TYPE_CHECKING:
    import torch

_EXAMPLE = "such as narrowboat.zoo:resnet101"


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A MODEL argument, found.

    Attributes:
        spec: what the user typed.
        factory: takes no arguments and returns an ``nn.Module``; a module that exists already also serves.
        example: the positional arguments of one pass, from the factory's ``example_inputs()``; None without one.
        image_mean: what an image's channels in [0, 1] are reduced by.
        image_std: what they are then divided by.
    """

    spec: str
    factory: Callable[..., Any]
    example: tuple[Any, ...] | None
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    def inputs(self, path: Path | None) -> tuple[Any, ...] | None:
        """The arguments to run with: read from ``path`` if there is one, else the example; None without either."""
        if path is None:
            return self.example
        first = load_input(path, self.example, mean=self.image_mean, std=self.image_std)
        return (first, *(self.example or ())[1:])


def resolve_model(spec: str) -> ResolvedModel:
    """Open a Hugging Face folder, or import ``package.module:factory``; modules in the current folder are found too.

    A folder may be used for text: ``text:FOLDER?window=64``, ``embed:FOLDER?window=128``.

    Raises:
        UsageError: not of that form, no such module, no such name in it, or not callable.
        ModelError: the module fails while it is imported, or its ``example_inputs`` does.
    """
    text = parse_text(spec)
    if text is not None:
        model = TextModel(text)
        if not (model.folder / "config.json").is_file():
            raise UsageError(f"{spec!r}: {model.folder} is no Hugging Face folder, which has a config.json")
        return ResolvedModel(spec, model, _example(spec, model), IMAGENET_MEAN, IMAGENET_STD)
    module_name, colon, attribute = spec.partition(":")
    if (Path(spec).expanduser() / "config.json").is_file():
        folder = FolderModel(Path(spec).expanduser())
        return ResolvedModel(spec, folder, _example(spec, folder), IMAGENET_MEAN, IMAGENET_STD)
    if not colon or not module_name or not attribute:
        what = "is a folder without a config.json" if Path(spec).is_dir() else "is no model"
        raise UsageError(f"{spec!r} {what}: give a Hugging Face folder, or package.module:factory, {_EXAMPLE}")
    factory: Any = _import(module_name)
    walked = module_name
    for part in attribute.split("."):
        if not hasattr(factory, part):
            near = difflib.get_close_matches(part, [name for name in dir(factory) if not name.startswith("_")], n=1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"{walked} has no {part!r}{hint}")
        factory = getattr(factory, part)
        walked = f"{walked}.{part}"
    if not callable(factory):
        raise UsageError(f"{spec} is a {type(factory).__name__}, not a function that returns an nn.Module")
    return ResolvedModel(
        spec=spec,
        factory=factory,
        example=_example(spec, factory),
        image_mean=getattr(factory, "image_mean", IMAGENET_MEAN),
        image_std=getattr(factory, "image_std", IMAGENET_STD),
    )


def _import(name: str) -> Any:
    current = str(Path.cwd())
    if current not in sys.path:
        sys.path.insert(0, current)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(f"{missing}."):
            raise UsageError(f"there is no module {name!r} here or installed: give package.module:factory") from error
        raise ModelError(f"{name} needs the module {missing!r}, which is not installed") from error
    except (ValueError, TypeError) as error:  # "..name", "a b"
        raise UsageError(f"{name!r} is no module name: give package.module:factory, {_EXAMPLE}") from error
    except Exception as error:
        raise ModelError(f"importing {name} failed: {type(error).__name__}: {error}") from error


def _example(spec: str, factory: Any) -> tuple[Any, ...] | None:
    make = getattr(factory, "example_inputs", None)
    if not callable(make):
        return None
    try:
        example = make()
    except NarrowboatError:
        raise
    except Exception as error:
        raise ModelError(f"{spec}.example_inputs() failed: {type(error).__name__}: {error}") from error
    return example if isinstance(example, tuple) else (example,)


def load_input(
    path: Path,
    example: tuple[Any, ...] | None,
    *,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> torch.Tensor:
    """The tensor in ``path``: a ``.npy`` array as it is, or an image as float32 [1, 3, height, width].

    An image is resized to the example's height and width (its own without an example) and normalised. An array
    of floats takes the example's floating-point dtype.

    Raises:
        UsageError: no such file, or neither an array nor an image.
    """
    if not path.is_file():
        raise UsageError(f"input {path} is not a file")
    if path.suffix == ".npy":
        return _load_array(path, example)
    return _load_image(path, example, mean, std)


def _first_tensor(example: tuple[Any, ...] | None) -> torch.Tensor | None:
    import torch

    first = example[0] if example else None
    return first if isinstance(first, torch.Tensor) else None


def _load_array(path: Path, example: tuple[Any, ...] | None) -> torch.Tensor:
    import numpy
    import torch

    try:
        array = numpy.load(path, allow_pickle=False)
        # A copy in native byte order and C order: what torch can take.
        tensor = torch.from_numpy(numpy.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise UsageError(f"input {path} is not a .npy array of numbers: {error}") from error
    like = _first_tensor(example)
    if like is not None and like.is_floating_point() and tensor.is_floating_point():
        tensor = tensor.to(like.dtype)
    return tensor


def _load_image(
    path: Path, example: tuple[Any, ...] | None, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> torch.Tensor:
    import numpy
    import torch

    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise UsageError(f"reading the image {path} needs a package: pip install pillow") from error
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise UsageError(f"input {path} is neither a .npy array nor an image: {error}") from error
    like = _first_tensor(example)
    if like is not None and like.ndim == 4:
        image = image.resize((like.shape[3], like.shape[2]), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(numpy.array(image, dtype=numpy.float32) / 255.0)
    return ((pixels - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1).unsqueeze(0).contiguous()
