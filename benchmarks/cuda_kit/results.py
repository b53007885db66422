"""The results file: written after every child, and read by a later run that goes on where this one ended."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

AGAIN = ("timeout", "not run")  # a later run with more time may do better


class Results:
    """What is known so far.

    Args:
        path: of the JSON file.
        command: that makes what is put from now on.
        resume: an earlier file to go on from.

    Attributes:
        data: the document.
    """

    def __init__(self, path: Path, command: str, resume: Path | None = None) -> None:
        self.path, self.command = path, command
        self.data: dict[str, Any] = {"machine": {}, "runs": [], "records": {}, "derived": {}, "checks": []}
        if resume is not None:
            self.data |= json.loads(resume.read_text(encoding="utf-8"))
        self.data["runs"].append({"command": command, "began": time.strftime("%Y-%m-%d %H:%M:%S")})

    @property
    def records(self) -> dict[str, dict[str, Any]]:
        """By key, in the order in which they were made."""
        found: dict[str, dict[str, Any]] = self.data["records"]
        return found

    def forget(self, prefixes: list[str]) -> None:
        """Let records go whose key begins with one of these."""
        for key in [key for key in self.records if any(key.startswith(prefix) for prefix in prefixes)]:
            del self.records[key]

    def has(self, key: str) -> bool:
        """Whether it is there, and a new try would give nothing else."""
        return key in self.records and self.records[key].get("status") not in AGAIN

    def get(self, key: str) -> dict[str, Any] | None:
        """A record that ended well; None if there is none."""
        record = self.records.get(key)
        return record if record is not None and record.get("status") == "ok" else None

    def put(self, key: str, record: dict[str, Any]) -> dict[str, Any]:
        """Note a record, and write the file."""
        self.records[key] = {**record, "command": self.command}
        self.write()
        return self.records[key]

    def write(self) -> None:
        """Under a temporary name, synced, and renamed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(self.data, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
