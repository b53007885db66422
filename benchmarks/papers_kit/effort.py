"""How much is measured: all of it in about half an hour on two quiet cores, or little in about five minutes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """Subjects and rounds of one run.

    Attributes:
        name: ``"full"`` or ``"quick"``.
        said: the difference, for the page.
        models, divisors, rounds: of streaming one network; weights over budget.
        ablation_rounds: of one removed operation at a time.
        changes, change_passes: of the budget while a network runs.
        applications, ratios, app_seconds, alone_seconds: of tasks with deadlines.
        sets, jobs, demands: of random task sets, demand over capacity.
        device_seconds: of whole jobs on the emulated device.
        folds: networks trained in the least memory, with their batches.
        rival_ways, rival_batch, rival_rounds, rival_steps, rival_shares: of training beside static ways.
        adapt_batch, technique_batch, ratio_batch: samples.
    """

    name: str
    said: str
    models: tuple[str, ...]
    divisors: tuple[float, ...]
    rounds: int
    ablation_rounds: int
    changes: int
    change_passes: int
    applications: tuple[str, ...]
    ratios: tuple[float, ...]
    app_seconds: float
    alone_seconds: float
    sets: int
    jobs: int
    demands: tuple[float, ...]
    device_seconds: float
    folds: tuple[tuple[str, int], ...]
    rival_ways: tuple[str, ...]
    rival_batch: int
    rival_rounds: int
    rival_steps: int
    rival_shares: tuple[float, ...]
    adapt_batch: int
    technique_batch: int
    ratio_batch: int


FULL = Effort(
    name="full",
    said="everything",
    models=("resnet101", "yolov3", "fcn", "vgg19"),
    divisors=(2.32, 5.81),
    rounds=2,
    ablation_rounds=3,
    changes=30,
    change_passes=200,
    applications=("self-driving", "roadside-unit", "drone"),
    ratios=(2.32, 5.81),
    app_seconds=40.0,
    alone_seconds=12.0,
    sets=200,
    jobs=20_000,
    demands=(1.0, 1.5, 1.962, 2.5, 3.0),
    device_seconds=6.0,
    folds=(("bert_small", 128), ("mobilenet_v2", 32), ("resnet50", 16), ("densenet121", 16)),
    rival_ways=("recompute", "accumulate", "both"),
    rival_batch=16,
    rival_rounds=2,
    rival_steps=3,
    rival_shares=(0.25,),
    adapt_batch=16,
    technique_batch=8,
    ratio_batch=16,
)
QUICK = Effort(
    name="quick",
    said="one network, one application of two tasks, small batches, one round: to see that every check works",
    models=("resnet101",),
    divisors=(2.32,),
    rounds=1,
    ablation_rounds=1,
    changes=8,
    change_passes=40,
    applications=("pair",),
    ratios=(2.32,),
    app_seconds=16.0,
    alone_seconds=6.0,
    sets=40,
    jobs=2_000,
    demands=(1.962,),
    device_seconds=2.0,
    folds=(("bert_small", 16),),
    rival_ways=("accumulate",),
    rival_batch=4,
    rival_rounds=1,
    rival_steps=2,
    rival_shares=(),
    adapt_batch=8,
    technique_batch=2,
    ratio_batch=2,
)
