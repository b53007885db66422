"""How many transformers architectures run streamed with exactly plain PyTorch's bits?

    python benchmarks/architectures.py                  # all of them, about an hour
    python benchmarks/architectures.py --only llama,t5
    python benchmarks/architectures.py --list

Each architecture is built small with random weights, run plainly, then streamed at the smallest budget that
narrowboat says will do: from a packed and an unpacked file, with and without example inputs, three passes and, where
the class can, five generated tokens. Blocks are made far smaller than a user's would be, so that even these small
models have many of them that share addresses. Every tensor of every result has to have the same bits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
CHUNK = 40  # architectures per worker process


def main() -> int:
    """Command line; exit code 1 if any result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="model types, separated by commas")
    parser.add_argument("--limit", type=int, help="at most so many architectures")
    parser.add_argument("--list", action="store_true", help="print the model types and leave")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    parser.add_argument("--recipes", type=Path, help="an earlier --out: build as it did, skip what could not be built")
    parser.add_argument("--variants", help="of packed+example,packed,unpacked+example,unpacked")
    parser.add_argument("--seconds", type=int, default=60, help="time limit for one architecture")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return _work(args)
    from architecture_kit.build import model_types

    names = args.only.split(",") if args.only else model_types()
    if args.list:
        print("\n".join(names))
        return 0
    recipes = json.loads(args.recipes.read_text())["results"] if args.recipes else {}
    if not args.only:
        names = [n for n in names if recipes.get(n, {}).get("verdict") != "could not build"]
    names = names[: args.limit]
    results: dict[str, Any] = {}
    start = time.monotonic()
    while len(results) < len(names):
        left = [n for n in names if n not in results]
        _run_worker(left[:CHUNK], args, recipes, results, len(names))
        if args.out:
            _write(args.out, results)
    _report(results, time.monotonic() - start)
    return 1 if any(r["verdict"] == "WRONG" for r in results.values()) else 0


def _run_worker(names: list[str], args: Any, recipes: Any, results: dict[str, Any], total: int) -> None:
    """One child process for some architectures; whatever it does not come back from is put down to the crash."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--seconds", str(args.seconds)]
    if args.variants:
        command += ["--variants", args.variants]
    environment = {"GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "1", **os.environ, "HF_HUB_OFFLINE": "1"}
    tasks = [{"name": n, "recipe": recipes.get(n, {}).get("recipe")} for n in names]
    with tempfile.TemporaryFile("w+") as noise:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise, text=True, env=environment
        )
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(json.dumps(tasks))
        child.stdin.close()
        waiting = list(names)
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            while waiting:
                if not selector.select(timeout=args.seconds + 60):
                    child.kill()
                    break
                line = child.stdout.readline()
                if not line:
                    break
                if not line.startswith("{"):
                    continue
                result = json.loads(line)
                waiting.remove(result["name"])
                results[result["name"]] = result
                _tell(result, len(results), total)
        code = child.wait()
        if waiting:
            noise.seek(0)
            last = noise.read()[-400:]
            result = {"name": waiting[0], "verdict": "crashed", "detail": f"exit code {code}: {last}"}
            results[waiting[0]] = result
            _tell(result, len(results), total)


def _tell(result: dict[str, Any], number: int, total: int) -> None:
    line = f"[{number}/{total}] {result['name']}: {result['verdict']}"
    if result["verdict"] != "exact":
        line += f"  {result.get('detail', '')[:400]}"
    print(line, flush=True)


def _work(args: Any) -> int:
    """The child: architectures from stdin, one JSON line each to stdout."""
    tasks = json.loads(sys.stdin.read())
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    from narrowboat.profile import workload

    # Small models have small weights: blocks this small make them swap as large ones do.
    workload.SMALL, workload.TARGET = 1 << 10, 4 << 10

    def on_alarm(*_: Any) -> None:
        raise TimeoutError(f"took longer than {args.seconds} s")

    signal.signal(signal.SIGALRM, on_alarm)
    for task in tasks:
        start = time.monotonic()
        result: dict[str, Any] = {"name": task["name"]}
        stage = "build"
        try:
            signal.alarm(args.seconds)
            from architecture_kit.build import build

            built = build(task["name"], task["recipe"])
            result.update(class_name=built.class_name, recipe=built.recipe(), inputs=_shapes(built.inputs))
            result["parameters"] = sum(p.numel() for p in built.model.parameters())
            stage = "check"
            signal.alarm(2 * args.seconds)
            _check(built, result, args.variants.split(",") if args.variants else None)
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            text = f"{type(error).__name__}: {str(error).strip()[:500]}"
            verdict = "timed out" if isinstance(error, TimeoutError) else "refused"
            result.update(verdict="could not build" if stage == "build" else verdict, detail=text)
        finally:
            with contextlib.suppress(Exception):
                signal.alarm(0)
        result["seconds"] = round(time.monotonic() - start, 2)
        print(json.dumps(result), file=out, flush=True)
    return 0


def _check(built: Any, result: dict[str, Any], variants: list[str] | None) -> None:
    import torch

    from architecture_kit import check

    reference = check.Reference.of(built.factory, built.model.state_dict(), built.inputs)
    tensors = [t for _, t in reference.first if isinstance(t, torch.Tensor) and t.is_floating_point()]
    result["finite"] = all(bool(torch.isfinite(t).any()) for t in tensors if t.numel())
    if getattr(built.model, "can_generate", lambda: False)():
        try:
            reference.generated = check.run_generate(built.model, built.inputs)
        except TimeoutError:
            raise
        except Exception as error:
            result["no_generate"] = f"{type(error).__name__}: {str(error).strip()[:200]}"
    result["generated"] = reference.generated is not None
    outcomes = {}
    with tempfile.TemporaryDirectory() as folder:
        files = check.write_files(built.model, built.factory, built.inputs, Path(folder))
        for variant in variants or check.VARIANTS:
            outcome = check.check_variant(variant, built.factory, files, built.inputs, reference)
            outcomes[variant] = vars(outcome)
    result["variants"] = outcomes
    bad = {v: o for v, o in outcomes.items() if o["verdict"] != "exact"}
    worst = "WRONG" if any(o["verdict"] == "WRONG" for o in bad.values()) else ("refused" if bad else "exact")
    if worst == "WRONG" and not _reproducible(built, reference):
        worst = "not reproducible"
    result["verdict"] = worst
    result["detail"] = " | ".join(f"{v}: {o['detail']}" for v, o in bad.items())


def _reproducible(built: Any, reference: Any) -> bool:
    """Whether plain PyTorch, built anew from the same weights, gives the same bits at all."""
    from architecture_kit import check

    again = check.Reference.of(built.factory, built.model.state_dict(), built.inputs)
    for kind, passes in reference.passes.items():
        if any(check.difference(a, b) for a, b in zip(passes, again.passes[kind], strict=True)):
            return False
    return reference.generated is None or not check.difference(
        reference.generated, check.run_generate(built.model, built.inputs)
    )


def _shapes(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v.shape) if hasattr(v, "shape") else str(v) for k, v in inputs.items()}


def _score(results: dict[str, Any]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for result in results.values():
        counts[result["verdict"]] = counts.get(result["verdict"], 0) + 1
    return counts


def _write(path: Path, results: dict[str, Any]) -> None:
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps({"score": _score(results), "results": results}, indent=1))
    os.replace(fresh, path)


def _report(results: dict[str, Any], seconds: float) -> None:
    counts = _score(results)
    built = sum(n for verdict, n in counts.items() if verdict not in ("could not build", "not reproducible"))
    generated = sum(1 for r in results.values() if r["verdict"] == "exact" and r.get("generated"))
    print(f"\n{counts.get('exact', 0)} of {built} architectures exact ({generated} of them with generate)")
    for verdict in sorted(counts):
        print(f"  {verdict}: {counts[verdict]}")
    for result in results.values():
        if result["verdict"] in ("refused", "WRONG", "crashed", "timed out"):
            print(f"\n{result['verdict']}  {result['name']} ({result.get('class_name', '')})\n    {result['detail']}")
    print(f"\n{seconds:.0f} s")


if __name__ == "__main__":
    raise SystemExit(main())
