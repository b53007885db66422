"""Serving, measured: what the gateway adds, how much it takes, and what overload, crashes and vanishing clients do.

    python benchmarks/serve.py --out docs/benchmarks
    python benchmarks/serve.py --only overhead,kill --quick --out /tmp/serve

All on loopback and bounded in count and time, some eight minutes in all. Each section is written to serve.json as
soon as it is done; what a run leaves out stays there as it was. Without ``--only`` the sections that are there at this
commit are not measured again, unless ``--again`` is given.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving_kit.kill import kill
from serving_kit.overhead import overhead
from serving_kit.overload import overload
from serving_kit.place import Place
from serving_kit.report import markdown
from serving_kit.throughput import throughput
from serving_kit.vanish import vanish

SECTIONS: dict[str, Callable[[Place, bool, Callable[[str], None]], dict[str, Any]]] = {
    "overhead": overhead,
    "throughput": throughput,
    "overload": overload,
    "kill": kill,
    "vanish": vanish,
}


def main() -> None:
    """Measure the sections and write serve.json and serve.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=_sections, help=f"of {','.join(SECTIONS)}; `none` draws anew what is there")
    parser.add_argument("--again", action="store_true", help="measure what is there too")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes: to see that it works")
    parser.add_argument("--work", type=Path, help="folder for weights and measured networks; a temporary one if not")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    kept = arguments.out / "serve.json"
    arguments.out.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    commit = _commit()
    wanted = arguments.only if arguments.only is not None else list(SECTIONS)
    with tempfile.TemporaryDirectory(prefix="narrowboat-serve-") as temporary:
        place = Place(arguments.work or Path(temporary), arguments.quick) if wanted else None
        for name in wanted:
            there = told.get(name, {})
            same = there.get("commit") == commit and there.get("quick") == arguments.quick
            if arguments.only is None and same and not arguments.again:
                continue
            assert place is not None
            begin = time.monotonic()
            found = SECTIONS[name](place, arguments.quick, _say)
            machine = {"commit": commit, "date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count()}
            took = round(time.monotonic() - begin)
            told[name] = {**machine, "quick": arguments.quick, "took_seconds": took, **found}
            kept.write_text(json.dumps(told, indent=1) + "\n")
    page = markdown(told)
    (arguments.out / "serve.md").write_text(page)
    print(page)


def _sections(said: str) -> list[str]:
    if said == "none":
        return []
    names = said.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    return names


def _commit() -> str:
    told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return told.stdout.strip() or "unknown"


def _say(said: str) -> None:
    print(said, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
