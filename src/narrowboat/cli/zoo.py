"""``narrowboat zoo``: list the published architectures, write random weights for one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from narrowboat.cli.output import print_facts, print_json, print_table, progress_bar
from narrowboat.quantities import format_bytes
from narrowboat.zoo import MODELS

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Published architectures to experiment with.")


@app.command("list")
def list_models(json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """List the architectures."""
    if json:
        print_json(
            [
                {
                    "name": model.name,
                    "model": f"narrowboat.zoo:{model.name}",
                    "description": model.description,
                    "real_weights": model.find_weights is not None,
                }
                for model in MODELS.values()
            ]
        )
        return
    print_table(
        "",
        ["model", "what it is"],
        [(f"narrowboat.zoo:{model.name}", model.description) for model in MODELS.values()],
    )


@app.command()
def save(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(MODELS)}.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The .safetensors file to write.")],
    seed: Annotated[int, typer.Option(help="Another seed gives other weights.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it is there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write random weights for an architecture, the same on every machine for the same seed."""
    from narrowboat.zoo.save import save_random_weights

    with progress_bar(f"writing {name}") as progress:
        size = save_random_weights(name, output, seed, overwrite=overwrite, progress=progress)
    if json:
        print_json({"name": name, "file": output, "file_bytes": size, "seed": seed})
    else:
        print_facts("", {"wrote": output, "bytes": f"{size:,} ({format_bytes(size)})", "seed": seed})
