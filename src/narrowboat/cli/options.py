"""The arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="package.module:factory, narrowboat.zoo:vgg19 say, or a model folder.")
]
WeightsOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Weights file or folder; the model's own if it brings some.")
]
BudgetOption = Annotated[
    str | None, typer.Option(metavar="BYTES", help="Such as 300MiB. Without it: 80 % of the available memory.")
]
InputOption = Annotated[Path | None, typer.Option(metavar="FILE", help="An image, or a .npy array.")]
