"""The first half of the demo: a real network on real photographs, with two fifths of its weights in memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from narrowboat.checkpoint import open_index
from narrowboat.errors import UsageError
from narrowboat.machine.malloc import MallocPolicy
from narrowboat.machine.memory import process_memory, reset_peak
from narrowboat.profile.warmup import warm_up
from narrowboat.report.exact import first_difference
from narrowboat.report.plain import load_weights
from narrowboat.stream.api import session, stream
from narrowboat.stream.prepare import prepare
from narrowboat.zoo import efficientnet_lite2
from narrowboat.zoo.imagenet import class_names
from narrowboat.zoo.resolve import load_input

PHOTOS = ("astronaut", "coffee", "cat")
SHARE = 0.4
TOP = 5


@dataclass(frozen=True)
class Photo:
    """One photograph's answer.

    Attributes:
        name: its name in scikit-image.
        top: ``(class name, probability)``, the likeliest first.
        latency_ms: of its pass.
        difference: where the logits differ from plain PyTorch's, in words; empty if they are the same bits.
    """

    name: str
    top: list[tuple[str, float]]
    latency_ms: float
    difference: str


@dataclass(frozen=True)
class PhotosReport:
    """The first half's result; sizes in bytes.

    Attributes:
        photos: the answers.
        weight_bytes: of all weights, as the arena holds them.
        held_bytes: weights held at any moment: resident ones and the window.
        share: ``held_bytes`` of ``weight_bytes``.
        budget_bytes: for weights, activations and everything else the model needs.
        min_budget_bytes: the smallest that would do.
        fixed_parts: what the budget pays besides weights, by name.
        peak_bytes: most the process took over its baseline.
        raised: the budget had to be above the wanted share of the weights plus the rest.
        bytes_read: per pass.
    """

    photos: list[Photo]
    weight_bytes: int
    held_bytes: int
    share: float
    budget_bytes: int
    min_budget_bytes: int
    fixed_parts: dict[str, int]
    peak_bytes: int
    raised: bool
    bytes_read: list[int]


def classify_photos(weights: Path, folder: Path, progress: Callable[[int, int], None]) -> PhotosReport:
    """Classify the three photographs with :data:`SHARE` of the weights in memory, and check every bit.

    Args:
        weights: packed weights of EfficientNet-Lite2.
        folder: where the photographs are put as files.
        progress: called with (steps done, steps in all).

    Raises:
        UsageError: scikit-image is not installed.
        BudgetError, WeightsError: as ``nb.stream``.
    """
    names = class_names()
    steps = len(PHOTOS) * 2 + 1
    images = [_photo(name, folder) for name in PHOTOS]
    warm_up()
    budget, raised = _budget(weights, images[0])
    progress(1, steps)
    gc.collect()
    reset_peak()
    baseline = process_memory().rss
    model = stream(efficientnet_lite2, weights, budget=budget, example=(images[0],))
    handle = session(model)
    with torch.inference_mode():
        logits = []
        for number, image in enumerate(images):
            logits.append(model(image))
            progress(2 + number, steps)
    peak = max(process_memory().hwm - baseline, 0)
    stats, plan = handle.stats(), handle.plan
    logits = [each.clone() for each in logits]
    handle.close()

    plain = efficientnet_lite2()
    load_weights(plain, open_index(weights))
    photos = []
    with torch.inference_mode():
        for number, (name, image, ours) in enumerate(zip(PHOTOS, images, logits, strict=True)):
            chances, classes = ours.softmax(-1)[0].topk(TOP)
            top = [(names[int(c)], float(p)) for p, c in zip(chances, classes, strict=True)]
            difference = first_difference([ours], [plain(image)])
            photos.append(Photo(name, top, stats["latency_ms"][number], difference))
            progress(2 + len(PHOTOS) + number, steps)
    held = plan.resident_bytes + plan.window_bytes
    return PhotosReport(
        photos,
        plan.weight_bytes,
        held,
        held / plan.weight_bytes,
        budget,
        plan.minimum,
        dict(plan.fixed_parts),
        peak,
        raised,
        stats["bytes_read"],
    )


def _photo(name: str, folder: Path) -> torch.Tensor:
    """scikit-image's photograph as the network's input, through a PNG as a user's own photograph would come."""
    try:
        import skimage.data
        from PIL import Image
    except ModuleNotFoundError as error:
        raise UsageError(f"the demo's photographs need a package: pip install 'narrowboat[demo]' ({error})") from error
    path = folder / f"{name}.png"
    pixels = numpy.asarray(getattr(skimage.data, "chelsea" if name == "cat" else name)())
    Image.fromarray(_square(pixels)).save(path)
    return load_input(
        path,
        efficientnet_lite2.example_inputs(),
        mean=efficientnet_lite2.image_mean,
        std=efficientnet_lite2.image_std,
    )


def _square(pixels: numpy.ndarray) -> numpy.ndarray:
    """The largest square in the middle: what the network was trained on is not squeezed."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return numpy.ascontiguousarray(pixels[top : top + side, left : left + side])


def _budget(weights: Path, image: torch.Tensor) -> tuple[int, bool]:
    """The budget that pays for :data:`SHARE` of the weights and for everything besides them at its leanest.

    Returns it in bytes, and whether the smallest feasible budget is above that.
    """
    prepared = prepare(efficientnet_lite2, weights, ((image,), {}))
    prepared.policy = MallocPolicy.STRICT
    workload, _ = prepared.workload()
    wanted = workload.fixed_bytes + int(SHARE * prepared.index.total_bytes)
    least, _ = prepared.check(1 << 62)
    return max(wanted, least), least > wanted
