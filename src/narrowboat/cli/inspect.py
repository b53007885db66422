"""``narrowboat inspect``: the tensors of a weights file, without loading them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from narrowboat.cli.output import print_facts, print_json, print_table
from narrowboat.quantities import format_bytes


def inspect(
    file: Annotated[Path, typer.Argument(help="A weights file, an index JSON, or a Hugging Face folder.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List the tensors of a weights file: name, dtype, shape, bytes, where they lie, and which are tied."""
    from narrowboat.checkpoint import open_index

    index = open_index(file)
    ties: dict[str, list[str]] = {}
    for alias, canonical in index.aliases.items():
        ties.setdefault(canonical, []).append(alias)
    tensors: list[dict[str, Any]] = [
        {
            "name": entry.name,
            "dtype": str(entry.dtype).removeprefix("torch."),
            "shape": list(entry.shape),
            "nbytes": entry.nbytes,
            "file": entry.file.name,
            "offset": entry.offset,
            "aliases": ties.get(entry.name, []),
        }
        for entry in index.entries.values()
    ]
    if json:
        print_json(
            {
                "files": index.files,
                "packed": index.packed,
                "digest": index.digest,
                "tensor_count": len(tensors),
                "total_bytes": index.total_bytes,
                "tensors": tensors,
            }
        )
        return

    several = len(index.files) > 1
    columns = ["tensor", "dtype", "shape", "bytes", "offset", *(["file"] if several else []), "also named"]
    rows = [
        [
            tensor["name"],
            tensor["dtype"],
            " x ".join(map(str, tensor["shape"])) or "scalar",
            f"{tensor['nbytes']:,}",
            f"{tensor['offset']:,}",
            *([tensor["file"]] if several else []),
            ", ".join(tensor["aliases"]),
        ]
        for tensor in tensors
    ]
    print_table("", columns, rows, right=("bytes", "offset"))
    largest = max(tensors, key=lambda tensor: tensor["nbytes"], default=None)
    print_facts(
        "",
        {
            "files": ", ".join(str(path) for path in index.files),
            "tensors": f"{len(tensors):,}" + (f" and {len(index.aliases):,} tied names" if index.aliases else ""),
            "bytes": f"{index.total_bytes:,} ({format_bytes(index.total_bytes)})",
            "largest": f"{largest['name']}, {format_bytes(largest['nbytes'])}" if largest else "none",
            "packed": "yes" if index.packed else "no: it streams with one copy; 'narrowboat pack' saves it",
            "digest": index.digest,
        },
    )
