"""``narrowboat pack``: rewrite a weights file for streaming."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from narrowboat.cli.output import print_facts, print_json, progress_bar
from narrowboat.quantities import format_bytes
from narrowboat.zoo.resolve import resolve_model


def pack(
    source: Annotated[Path, typer.Argument(help="A weights file, an index JSON, or a Hugging Face folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The .safetensors file to write.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FACTORY", help="Write the tensors in the order in which this model uses them."),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read the result back and check every digest.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it is there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write the tensors at page-aligned offsets with their digests, as plain safetensors that every reader opens.

    FILE appears whole or not at all.
    """
    from narrowboat import checkpoint

    order: list[str] | None = None
    if model is not None:
        resolved = resolve_model(model)
        from narrowboat.profile import execution_order

        order = execution_order(resolved.factory, checkpoint.open_index(source))
    with progress_bar("packing") as progress:
        checkpoint.pack(source, output, order=order, progress=progress, overwrite=overwrite)
    if verify:
        with progress_bar("verifying") as progress:
            checkpoint.verify(output, progress=progress)

    index = checkpoint.open_index(output)
    size = output.stat().st_size
    if json:
        print_json(
            {
                "file": output,
                "tensor_count": len(index.entries),
                "total_bytes": index.total_bytes,
                "file_bytes": size,
                "digest": index.digest,
                "ordered_by": model,
                "verified": verify,
            }
        )
        return
    print_facts(
        "",
        {
            "wrote": output,
            "tensors": f"{len(index.entries):,}, {format_bytes(index.total_bytes)}",
            "file": f"{format_bytes(size)}, of which {format_bytes(size - index.total_bytes)} header and alignment",
            "order": f"as {model} uses them" if model else "as in the source",
            "digest": index.digest,
            "verified": "every digest matches" if verify else "not asked for (--verify)",
        },
    )
