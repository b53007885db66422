"""AirLLM, where it is installed: in this environment, or in a folder of its own (``pip install --target``).

It is no dependency of ours, and it needs packages that the rest does not: a folder of its own leaves the pinned
environment as it is.

    pip install --no-deps --target FOLDER airllm==4.0.0
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any


def add_site(site: Path | None) -> bool:
    """Make the packages in ``site`` importable after all others; returns whether AirLLM can be found."""
    if site is not None and str(site) not in sys.path:
        sys.path.append(str(site))
    return importlib.util.find_spec("airllm") is not None


def airllm_version() -> str:
    """Its version; empty if it is not installed."""
    found = (made.version for made in distributions(name="airllm"))
    return next(found, "")


def airllm_model(folder: Path, layers: Path) -> Any:
    """AirLLM's model on the processor, its layers in ``layers``, which are written if they are not there."""
    from airllm import AutoModel

    return AutoModel.from_pretrained(str(folder), device="cpu", layer_shards_saving_path=str(layers))
