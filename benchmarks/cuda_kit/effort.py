"""How much is measured: in full, quickly, or just enough to see that it works."""

from __future__ import annotations

from dataclasses import dataclass

DIVISORS = (2.32, 5.81)  # the model's bytes over those of the device that its weights get


@dataclass(frozen=True, slots=True)
class Inference:
    """One model's inference.

    Attributes:
        rounds: of resident and narrowboat.
        most: largest batch size.
        all_batches: narrowboat at every batch size that resident was measured at; else at the telling ones.
        settle: passes before those that count.
        least, passes: that count, at least and at most.
        seconds: after which no further pass is begun.
        peers: the others, in order.
        storage: also from storage, with little pinned memory.
        timeout: seconds of a child.
    """

    rounds: int
    most: int
    all_batches: bool
    settle: int
    least: int
    passes: int
    seconds: float
    peers: tuple[str, ...]
    storage: bool
    timeout: float


@dataclass(frozen=True, slots=True)
class Effort:
    """All of it.

    Attributes:
        vit, decoder: of the inference part.
        swap_bytes, swap_chunks, swap_repeats: of a task that is swapped.
        copy_bytes, copies: of the measurement of bandwidth.
        task_models, task_seconds, calibration: of the tasks.
        training: the model's shape and batch.
        steps: timed, after two that are not.
        shares: of plain's activations that narrowboat's budgets leave room for.
        minutes: after which no child is begun.
    """

    vit: Inference
    decoder: Inference
    swap_bytes: int
    swap_chunks: tuple[int, ...]
    swap_repeats: int
    copy_bytes: tuple[int, ...]
    copies: int
    task_models: tuple[str, ...]
    task_seconds: float
    calibration: float
    training: dict[str, int]
    steps: int
    shares: tuple[float, ...]
    minutes: float


_MIB = 1 << 20
_DIFFUSERS = ("diffusers_block_record", "diffusers_leaf_record", "diffusers_block", "diffusers_leaf")
_PEERS = ("accelerate", "accelerate_placed", *_DIFFUSERS, "flextensor")
_FEW = ("accelerate", *_DIFFUSERS[:2], "flextensor")
_TASKS = ("vit_large", "yolov3", "fcn", "resnet101")
_GPT = {"layers": 16, "width": 1024, "heads": 16, "vocabulary": 32_768, "length": 512, "batch": 16}

FULL = Effort(
    vit=Inference(2, 512, True, 4, 5, 30, 1.5, _PEERS, True, 150),
    decoder=Inference(1, 64, True, 4, 4, 12, 3.0, _PEERS, True, 300),
    swap_bytes=1024 * _MIB,
    swap_chunks=(2 * _MIB, 8 * _MIB, 32 * _MIB, 128 * _MIB),
    swap_repeats=5,
    copy_bytes=(64 * _MIB, 128 * _MIB, 256 * _MIB),
    copies=15,
    task_models=_TASKS,
    task_seconds=60,
    calibration=8,
    training=_GPT,
    steps=8,
    shares=(0.5, 0.25),
    minutes=24,
)
QUICK = Effort(
    vit=Inference(1, 512, False, 4, 5, 15, 0.8, _FEW, True, 90),
    decoder=Inference(1, 64, False, 4, 3, 6, 1.5, _FEW[1:], False, 180),
    swap_bytes=1024 * _MIB,
    swap_chunks=(2 * _MIB, 8 * _MIB, 32 * _MIB, 128 * _MIB),
    swap_repeats=3,
    copy_bytes=(64 * _MIB, 128 * _MIB, 256 * _MIB),
    copies=9,
    task_models=_TASKS,
    task_seconds=15,
    calibration=2,
    training=_GPT,
    steps=4,
    shares=(0.5, 0.25),
    minutes=7.5,
)
_SMALL = Inference(
    rounds=1,
    most=2,
    all_batches=True,
    settle=3,
    least=3,
    passes=5,
    seconds=0.3,
    peers=("accelerate", "diffusers_block", "diffusers_leaf", "flextensor"),
    storage=True,
    timeout=60,
)
SMALL = Effort(
    vit=_SMALL,
    decoder=_SMALL,
    swap_bytes=16 * _MIB,
    swap_chunks=(2 * _MIB, 8 * _MIB),
    swap_repeats=2,
    copy_bytes=(8 * _MIB,),
    copies=3,
    task_models=("resnet50", "densenet121", "mobilenet_v2", "gpt12"),
    task_seconds=6,
    calibration=1,
    training={"layers": 3, "width": 64, "heads": 2, "vocabulary": 256, "length": 64, "batch": 8},
    steps=2,
    shares=(0.5,),
    minutes=10,
)
