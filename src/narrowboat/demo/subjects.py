"""One way to run one model, in a process of its own: ``python -m narrowboat.demo.subjects SUBJECT --json ...``.

Subjects: ``narrowboat``; ``plain`` (PyTorch, all weights read into memory); ``mmap`` (parameters are views of the
mapped file: ``safetensors.torch.load_file``, or ``torch.load(mmap=True)``); ``accelerate`` (``disk_offload`` over an
index that points into the safetensors file).

Everything is measured the same way. The libraries are imported, warmed up, and the kernel's high-water mark reset;
then the subject builds the model, loads what it loads and runs its passes. Each event is a line of JSON on stderr
the moment it happens, so that a child which is killed still leaves what it measured; the last line, on stdout, is
the whole result:

======================== ======= ==========================================================================
key                      unit    meaning
======================== ======= ==========================================================================
subject, model, weights  text    as given
budget_bytes             bytes   as given; null for subjects that know none
first_answer_ms          ms      from the model's name to its first output, libraries loaded before
latency_ms               ms      per pass, from outside
bytes_read               bytes   per pass, from storage by the kernel's count (/proc/self/io); null where hidden
baseline_bytes           bytes   resident memory before the model
peak_bytes               bytes   most resident memory over the baseline (VmHWM), mapped files included
output_digest            text    sha256 of the last output's tensors
stopped                  bool    the time limit ended it before all passes were run
details                  object  what only this subject knows (narrowboat: plan, stalls, prediction)
======================== ======= ==========================================================================
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrowboat.errors import NarrowboatError, UsageError
from narrowboat.machine.memory import process_memory, reset_peak
from narrowboat.machine.openmp import apply_openmp_policy
from narrowboat.quantities import format_bytes, format_seconds, parse_bytes
from narrowboat.zoo.request import Request, find_request

if TYPE_CHECKING:
    from torch import nn

SUBJECTS = ("narrowboat", "plain", "mmap", "accelerate")


@dataclass
class Prepared:
    """A model that is ready to be called.

    Attributes:
        module: the model.
        details: called after the passes, for what only the subject knows.
        close: called at the end.
    """

    module: nn.Module
    details: Callable[[], dict[str, Any]] = dict
    close: Callable[[], None] = field(default=lambda: None)


def _narrowboat(request: Request, budget: int | None) -> Prepared:
    from narrowboat.stream.api import session, stream

    if budget is None:
        raise UsageError("the subject narrowboat needs --budget")
    model = stream(request.factory, request.weights, budget=budget, example=request.need_inputs())
    handle = session(model)
    kept = (
        "stall_ms", "predicted_latency_ms", "min_budget_bytes", "weight_bytes", "resident_bytes", "window_bytes",
        "fixed_parts", "direct_io", "allocator_policy", "copied_bytes", "bandwidth_bytes_per_s", "misses",
    )  # fmt: skip

    def details() -> dict[str, Any]:
        stats = handle.stats()
        return {key: stats[key] for key in kept}

    return Prepared(model, details, handle.close)


def _plain(request: Request, budget: int | None) -> Prepared:
    from narrowboat.checkpoint import open_index
    from narrowboat.profile.skeleton import build_skeleton
    from narrowboat.report.plain import load_weights

    # Without random initial values, which would be overwritten: the quickest way to have it all in memory.
    module = build_skeleton(request.factory)
    load_weights(module, open_index(request.weights))
    return Prepared(module)


def _mmap(request: Request, budget: int | None) -> Prepared:
    import torch
    from safetensors.torch import load_file

    from narrowboat.checkpoint import open_index
    from narrowboat.checkpoint.packed_format import PAD_PREFIX
    from narrowboat.profile.skeleton import build_skeleton

    module = build_skeleton(request.factory)
    state: dict[str, torch.Tensor] = {}
    for path in open_index(request.weights).files:
        if path.suffix == ".safetensors":
            state.update(load_file(path))
        else:
            state.update(torch.load(path, mmap=True, weights_only=True, map_location="cpu"))
    state = {name: tensor for name, tensor in state.items() if not name.startswith(PAD_PREFIX)}
    module.load_state_dict(state, assign=True)
    return Prepared(module)


def _accelerate(request: Request, budget: int | None) -> Prepared:
    from accelerate import disk_offload, init_empty_weights

    from narrowboat.checkpoint import open_index
    from narrowboat.report.plain import load_weights

    index = open_index(request.weights)
    with init_empty_weights():
        module = request.factory()
    load_weights(module, index, buffers_only=True)
    folder = tempfile.TemporaryDirectory(prefix="narrowboat-accelerate-")
    entries = {
        name: {
            "safetensors_file": str(entry.file),
            "weight_name": entry.name,
            "dtype": str(entry.dtype).removeprefix("torch."),
        }
        for name in index.names()
        if (entry := index.resolve(name)) is not None
    }
    # disk_offload takes the weights from where an index in its folder says they are.
    Path(folder.name, "index.json").write_text(json.dumps(entries), encoding="utf-8")
    module = disk_offload(module, folder.name, execution_device="cpu")
    return Prepared(module, close=folder.cleanup)


_PREPARE: dict[str, Callable[[Request, int | None], Prepared]] = {
    "narrowboat": _narrowboat,
    "plain": _plain,
    "mmap": _mmap,
    "accelerate": _accelerate,
}


def _import_libraries(subject: str) -> None:
    """What the subject imports belongs to the process, not to the model."""
    import safetensors.torch  # noqa: F401

    import narrowboat.report.plain
    import narrowboat.stream.api  # noqa: F401

    if subject == "accelerate":
        try:
            import accelerate  # noqa: F401
        except ModuleNotFoundError as error:
            raise UsageError("the subject accelerate needs a package: pip install 'narrowboat[bench]'") from error


def storage_bytes_read() -> int | None:
    """Bytes this process has had read from storage, page faults and readahead included; None where it is hidden."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines():
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    return None


def _emit(event: str, **values: object) -> None:
    sys.stderr.write(json.dumps({"event": event, **values}) + "\n")
    sys.stderr.flush()


def measure(
    subject: str,
    request: Request,
    *,
    budget: int | None,
    passes: int,
    seconds: float | None = None,
    hold: bool = False,
    trace: Path | None = None,
) -> dict[str, Any]:
    """Run ``passes`` passes of one subject; returns the result as the table in the module's docstring has it.

    Args:
        subject: one of ``SUBJECTS``.
        request: model, weights and inputs.
        budget: bytes, for subjects that know one.
        passes: how many; the time limit may end it earlier, after the pass under way.
        seconds: the time limit, from the model's name on.
        hold: after warming up wait for a line on stdin, so that the parent can put this process under a limit.
        trace: narrowboat only: write the last two passes as Chrome/Perfetto JSON.

    Raises:
        UsageError: no such subject, or something it needs is missing.
    """
    import torch

    from narrowboat.machine.malloc import MallocPolicy, set_malloc_policy
    from narrowboat.profile.warmup import warm_up, warm_up_tracer
    from narrowboat.report.exact import output_digest

    _import_libraries(subject)
    inputs = request.need_inputs()
    warm_up()
    if subject == "narrowboat":
        warm_up_tracer()  # the first stream of a model brings it in; it is no part of the model
    if subject != "narrowboat":
        set_malloc_policy(MallocPolicy.DEFAULT)  # as it is without narrowboat
    gc.collect()
    reset_peak()
    baseline = process_memory().rss
    _emit("ready", baseline_bytes=baseline)
    if hold:
        sys.stdin.readline()
    begun = time.perf_counter()
    prepared = _PREPARE[subject](request, budget)
    latencies: list[float] = []
    read: list[int | None] = []
    starts: list[float] = []
    output: Any = None
    first_answer = 0.0
    stopped = False
    try:
        with torch.inference_mode():
            for number in range(passes):
                if number and seconds is not None and time.perf_counter() - begun > seconds:
                    stopped = True
                    break
                output = None
                torch.manual_seed(0)
                before = storage_bytes_read()
                starts.append(time.perf_counter())
                output = prepared.module(*inputs)
                now = time.perf_counter()
                after = storage_bytes_read()
                latencies.append((now - starts[-1]) * 1e3)
                read.append(after - before if before is not None and after is not None else None)
                first_answer = first_answer or (now - begun) * 1e3
                peak = max(process_memory().hwm - baseline, 0)
                _emit(
                    "pass",
                    latency_ms=latencies[-1],
                    bytes_read=read[-1],
                    first_answer_ms=first_answer,
                    peak_bytes=peak,
                    # Of the first pass, so that it is known of a child that is killed later.
                    output_digest=output_digest(output) if number == 0 else None,
                )
        details = prepared.details()
        digest = output_digest(output)
    finally:
        prepared.close()
    if trace is not None and subject == "narrowboat":
        from narrowboat.stream.api import session

        session(prepared.module).trace().save_chrome(trace, starts[max(len(starts) - 2, 0)])
    return {
        "subject": subject,
        "model": request.resolved.spec,
        "weights": str(request.weights),
        "budget_bytes": budget,
        "first_answer_ms": first_answer,
        "latency_ms": latencies,
        "bytes_read": read,
        "baseline_bytes": baseline,
        "peak_bytes": peak,
        "output_digest": digest,
        "stopped": stopped,
        "details": details,
    }


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m narrowboat.demo.subjects", description=__doc__.splitlines()[0])
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("--model", required=True, metavar="MODULE:FACTORY")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="the model's own if it brings some")
    parser.add_argument("--input", type=Path, metavar="FILE", help="an image or a .npy array")
    parser.add_argument("--budget", metavar="BYTES")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--seconds", type=float, help="start no further pass after this long")
    parser.add_argument("--hold", action="store_true", help="after warming up wait for a line on stdin")
    parser.add_argument("--trace", type=Path, metavar="FILE.json", help="narrowboat: trace of the last two passes")
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run one subject; returns the exit code: 0, 1 it failed, 2 wrong usage."""
    options = _arguments(argv)
    apply_openmp_policy()  # before torch is imported
    try:
        request = find_request(options.model, options.weights, options.input)
        result = measure(
            options.subject,
            request,
            budget=None if options.budget is None else parse_bytes(options.budget),
            passes=max(options.passes, 1),
            seconds=options.seconds,
            hold=options.hold,
            trace=options.trace,
        )
    except NarrowboatError as error:
        _emit("error", type=type(error).__name__, message=str(error), **vars(error))
        return 2 if isinstance(error, UsageError) else 1
    if options.json:
        print(json.dumps(result))
    else:
        for number, latency in enumerate(result["latency_ms"], start=1):
            print(f"pass {number}: {format_seconds(latency / 1e3)}")
        print(
            f"{format_bytes(result['peak_bytes'])} over the baseline, "
            f"first answer after {result['first_answer_ms']:.0f} ms"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
