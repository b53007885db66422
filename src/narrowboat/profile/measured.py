"""What passes of a model were measured to take on this machine, kept with everything that it depends on.

A profile is found again by its identity: the weights, the model with its input signature and dtypes, PyTorch's
version, the threads, the processor. One that was made elsewhere, or of something else, is told apart by name and never
used silently. Sessions keep what they measure; ``narrowboat profile`` measures more, and on purpose.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from narrowboat.errors import ProfileError
from narrowboat.machine.cache import cache_folder, write_durably
from narrowboat.machine.cpu import cpu_supply
from narrowboat.machine.malloc import MallocPolicy

FORMAT = 4


@dataclass
class MeasuredProfile:
    """Measurements of one model on one machine.

    Attributes:
        identity: what they depend on, by name.
        policy: the allocator policy they were taken under.
        step_seconds: computing time of each step of a pass, seconds.
        contention: by what share a pass computes longer while storage is read all along; None where not measured.
        slowed: for each step, the factor by which it takes longer then; empty where not measured.
        needs: by allocator policy, the most bytes that the process took beside the weights; empty where not measured.
        paces: by allocator policy, seconds of computing per pass.
        bandwidths: bytes per second of single reads beside computing, sorted; empty where not measured.
        blocks: for people: each block's name, bytes, uses, computing times and live activation bytes.
        table: rows of a ``plan.table.PlanTable``, as JSON; empty until a curve was computed.
        least: the smallest budget with which any tiling can be streamed, bytes, and what sets it; None if unknown.
        about: by which command it was measured, on which machine, when (``machine.about``); empty for a session's own.
    """

    identity: dict[str, str]
    policy: str
    step_seconds: list[float]
    contention: float | None = None
    slowed: list[float] = field(default_factory=list)
    needs: dict[str, int] = field(default_factory=dict)
    paces: dict[str, float] = field(default_factory=dict)
    bandwidths: list[float] = field(default_factory=list)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    table: list[dict[str, Any]] = field(default_factory=list)
    least: tuple[int, str] | None = None
    about: dict[str, Any] = field(default_factory=dict)


def identity_of(trace_key: str, weights_digest: str, device: str = "") -> dict[str, str]:
    """What measurements of a model depend on.

    Args:
        trace_key: ``trace_cache.fingerprint``: the model, its code, and the example's shapes and dtypes.
        weights_digest: ``WeightsIndex.digest``.
        device: the name of the one that computes; empty for the processor.
    """
    return {
        **({"device": device} if device else {}),
        "weights": weights_digest,
        "model and inputs": trace_key,
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "processor": cpu_supply().model,
    }


def load_profile(identity: dict[str, str]) -> MeasuredProfile | None:
    """What was kept under this identity; None if there is nothing, or it cannot be read."""
    try:
        return read_profile(_path(identity), identity)
    except ProfileError:
        return None


def save_profile(profile: MeasuredProfile) -> str:
    """Keep ``profile``; where the cache folder cannot be written, it is measured anew each time.

    Returns:
        Why it was not kept; empty if it was.
    """
    try:
        write_profile(profile, _path(profile.identity))
    except OSError as error:
        return str(error)
    return ""


def write_profile(profile: MeasuredProfile, path: Path) -> None:
    """Write ``profile`` as JSON, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    write_durably(path, json.dumps({"format": FORMAT, **asdict(profile)}, separators=(",", ":")))


def read_profile(path: Path, identity: dict[str, str]) -> MeasuredProfile:
    """A profile from a file, if it is this model's on this machine.

    Raises:
        ProfileError: the file cannot be read, is no profile, or was made of something else; says of what.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        found = MeasuredProfile(
            identity={str(k): str(v) for k, v in raw["identity"].items()},
            policy=MallocPolicy(raw["policy"]).value,
            step_seconds=[float(s) for s in raw["step_seconds"]],
            contention=None if raw["contention"] is None else float(raw["contention"]),
            slowed=[float(factor) for factor in raw["slowed"]],
            needs={MallocPolicy(name).value: int(nbytes) for name, nbytes in raw["needs"].items()},
            paces={MallocPolicy(name).value: float(seconds) for name, seconds in raw["paces"].items()},
            bandwidths=[float(b) for b in raw["bandwidths"]],
            blocks=list(raw["blocks"]),
            table=list(raw["table"]),
            least=(int(raw["least"][0]), str(raw["least"][1])) if raw["least"] is not None else None,
            about=dict(raw.get("about", {})),
        )
        numbers = [*found.step_seconds, *found.slowed, *found.paces.values(), found.contention or 0.0]
        if raw["format"] != FORMAT or any(not 0 <= number < 1e6 for number in numbers):
            raise ValueError("values out of range")
    except OSError as error:
        raise ProfileError(f"profile {path}: {error.strerror or error}") from error
    except KeyError as error:
        raise ProfileError(f"{path} is not a profile that this version can read: it has no {error}") from error
    except ValueError as error:
        raise ProfileError(f"{path} is not a profile that this version can read: {error}") from error
    except (TypeError, AttributeError, IndexError) as error:
        raise ProfileError(f"{path} is not a profile that this version can read: its form is another") from error
    other = [name for name, value in identity.items() if found.identity.get(name) != value]
    if other:
        raise ProfileError(
            f"profile {path} was measured with another {', another '.join(other)}: "
            "measure anew with narrowboat profile"
        )
    return found


def _path(identity: dict[str, str]) -> Path:
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "profiles" / f"{key}.json"
