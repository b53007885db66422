"""Draw the figures of docs/concepts/: ``python docs/figures/make.py [FOLDER]``, ``docs/images`` by default."""

from __future__ import annotations

import sys
from pathlib import Path

import recomputing
import scheduling
import streaming


def main() -> None:
    """All of them."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "images"
    for module in (streaming, scheduling, recomputing):
        for path in module.draw(folder):
            print(path)


if __name__ == "__main__":
    main()
