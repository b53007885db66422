"""``narrowboat generate``: text from a language model inside a byte budget."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from narrowboat.cli.budget import device_budget
from narrowboat.cli.options import DeviceOption, HostBudgetOption
from narrowboat.cli.output import print_facts, print_json
from narrowboat.machine.about import about
from narrowboat.quantities import format_bytes, format_seconds


def generate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A Hugging Face folder; nothing is downloaded.")],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to go on from.")],
    budget: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Such as 2GiB. Without it: 80 % of the available memory.")
    ] = None,
    device: DeviceOption = "cpu",
    host_budget: HostBudgetOption = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="At most so many.")] = 64,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Reserve the cache for so many; the prompt and --new-tokens without it.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Sample; without it, the likeliest token each time.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python files that the folder brings.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Stream the model in FOLDER from storage and print its text as it comes, then what each token took."""
    bytes_allowed = device_budget(budget, host_budget, device)
    options: dict[str, Any] = {"do_sample": False}
    if temperature:
        options = {"do_sample": True, "temperature": temperature}
    import torch

    from narrowboat.report.generate import generate_text

    torch.manual_seed(seed)
    report = generate_text(
        folder,
        prompt,
        budget=bytes_allowed,
        device=device,
        new_tokens=new_tokens,
        max_tokens=max_tokens,
        trust_remote_code=trust_remote_code,
        tell=(lambda text: None) if json else _tell,
        **options,
    )
    if json:
        print_json({"folder": folder, "prompt": prompt, **dataclasses.asdict(report), "about": about()})
        return
    _tell("\n")
    of_what = "over the process baseline" if device == "cpu" else f"of {device}"
    speed = f"{report.tokens_per_s:.2f} tokens/s" if report.tokens_per_s else "one token"
    bound = f"{report.bound_tokens_per_s:.2f} tokens/s" if report.bound_tokens_per_s else "any speed: nothing is read"
    print_facts(
        "",
        {
            "tokens": f"{report.prompt_tokens} in the prompt, {len(report.token_ids)} new",
            "first token": f"{format_seconds(report.first_token_ms / 1e3)} after the start",
            "speed": f"{speed}; storage allows {bound}",
            "read per token": f"{format_bytes(int(report.bytes_per_token))} "
            f"at {report.bandwidth_bytes_per_s / 1e9:.2f} GB/s",
            "peak memory": f"{format_bytes(report.peak_bytes)} {of_what}, of "
            f"{format_bytes(report.budget_bytes)} (smallest possible: {format_bytes(report.min_budget_bytes)})",
            "key-value cache": f"{format_bytes(report.cache_bytes)} reserved",
        },
    )


def _tell(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
