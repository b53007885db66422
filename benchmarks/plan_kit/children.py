"""What the child processes of benchmarks/plan.py do."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

import narrowboat as nb
from inference_kit.children import Emit
from inference_kit.materials import Material
from inference_kit.measure import digest_of
from narrowboat.machine.malloc import MallocPolicy, set_malloc_policy
from narrowboat.machine.memory import process_memory, reset_peak
from narrowboat.profile.warmup import warm_up
from narrowboat.report.foresee import foresee
from narrowboat.report.profile import measure_profile
from plan_kit.ablations import ABLATIONS
from plan_kit.random_changes import changes

SETTLING = 3  # passes after which the plan made of measurements is in force


def profile(emit: Emit, files: Material) -> None:
    """What a user does once: ``narrowboat profile``, kept in the cache folder."""
    found = measure_profile(files.model, files.packed, files.model.example_inputs())
    emit("profile", seconds=sum(found.step_seconds), contention=found.contention, needs=found.needs)


def facts(emit: Emit, files: Material) -> None:
    """The smallest budget under what the profile found, and one that holds everything."""
    warm_up()
    plan = foresee(files.model, files.packed, budget=1 << 40, example=_example(files)).plan
    emit("facts", minimum=plan.minimum, enough=plan.weight_bytes + plan.fixed_bytes, weights=plan.weight_bytes)


def everything_in(emit: Emit, files: Material, passes: int) -> None:
    """Passes with all weights in memory, by plain PyTorch."""
    from safetensors.torch import load_file

    warm_up()
    set_malloc_policy(MallocPolicy.DEFAULT)  # plain PyTorch's; warming up leaves the strict one in force
    model = files.model().eval()
    model.load_state_dict(load_file(files.plain), assign=True)
    model = _settled_copy(model)
    inputs = files.model.example_inputs()
    with torch.inference_mode():
        seconds = [_timed(model, inputs)[0] for _ in range(passes + 2)][2:]
        digest = digest_of(model(*inputs))
    emit("resident", seconds=statistics.median(seconds), digest=digest)


def run_plan(emit: Emit, files: Material, budget: int, scheme: str, ablation: str, passes: int) -> None:
    """Foresee, run, and tell both.

    Args:
        budget: bytes.
        scheme: of ``narrowboat.plan.schemes``.
        ablation: of ``plan_kit.ablations``; empty for none.
        passes: how many are measured, after those in which the session settles.
    """
    warm_up()
    example = _example(files)
    foreseen = foresee(files.model, files.packed, budget=budget, example=example, scheme=scheme).plan
    inputs = files.model.example_inputs()
    with ABLATIONS[ablation]() as options:
        weights = files.plain if options.pop("unpacked", False) else files.packed
        model = nb.stream(files.model, weights, budget=budget, scheme=scheme, **options)
        with nb.session(model) as session, torch.inference_mode():
            for _ in range(SETTLING):
                output = model(*inputs)
            predicted = session.plan
            seconds = [_timed(model, inputs)[0] for _ in range(passes)]
            stats = session.stats()
            digest = digest_of(output)
    emit(
        "plan",
        foreseen=foreseen.predicted_latency,
        predicted=predicted.predicted_latency,
        bound=predicted.lower_bound,
        gap=foreseen.gap,
        seconds=statistics.median(seconds),
        bytes_read=statistics.median(stats["bytes_read"][-passes:]),
        stall=statistics.median(stats["stall_ms"][-passes:]) / 1e3,
        resident_bytes=predicted.resident_bytes,
        window_bytes=predicted.window_bytes,
        policy=stats["allocator_policy"],
        bandwidth=stats["bandwidth_bytes_per_s"],
        tiled=len(stats["tiled_layers"]),
        digest=digest,
    )


def live(emit: Emit, files: Material, lowest: int, highest: int, passes: int, count: int) -> None:
    """Random changes of the budget while passes run; every answer and the peak of every pass are looked at."""
    warm_up()
    inputs = files.model.example_inputs()
    model = nb.stream(files.model, files.packed, budget=highest)
    with nb.session(model) as session, torch.inference_mode():
        reference = digest_of(model(*inputs))
        for _ in range(4):
            model(*inputs)
        # The session cannot go below what its layers, as they are cut now, need.
        lowest = max(lowest, int(session.prepared.check(1 << 62)[0] * 1.2))
        plan = changes(lowest, highest, passes, count)
        steady: dict[int, float] = {}
        switches, wrong, worst_over, worst_first_over = [], 0, 0, 0
        for number in range(passes):
            changed = number in plan
            if changed:
                before, read = session.budget, session.reader.bytes_read
                start = time.perf_counter()
                session.budget = plan[number]
                switches.append((time.perf_counter() - start, before, plan[number]))
            reset_peak()
            seconds, output = _timed(model, inputs)
            wrong += digest_of(output) != reference
            over = process_memory().hwm - session.baseline - session.budget
            worst_over = max(worst_over, over)
            if changed:
                worst_first_over = max(worst_first_over, over)
                switches[-1] = (*switches[-1], seconds, session.reader.bytes_read - read)
            else:
                steady[session.budget] = min(seconds, steady.get(session.budget, seconds))
        bandwidth = session.machine.bandwidth
    emit(
        "live",
        lowest=lowest,
        passes=passes,
        changes=len(switches),
        wrong=wrong,
        worst_over=worst_over,
        worst_first_over=worst_first_over,
        switch_median=statistics.median(s for s, *_ in switches),
        switch_worst=max(s for s, *_ in switches),
        # Beyond the switch itself, the first pass after it may take what its reads take.
        first_pass_extra=[
            seconds - steady.get(after, seconds) - nbytes / bandwidth for _, _, after, seconds, nbytes in switches
        ],
    )


def _example(files: Material) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return files.model.example_inputs(), {}


def _settled_copy(model: torch.nn.Module) -> torch.nn.Module:
    """The weights in memory of the process: the mapping of a file would count page faults as computing."""
    for parameter in (*model.parameters(), *model.buffers()):
        parameter.data = parameter.data.clone()
    return model


def _timed(model: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[float, Any]:
    start = time.perf_counter()
    output = model(*inputs)
    return time.perf_counter() - start, output
