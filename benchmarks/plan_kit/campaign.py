"""Which child of benchmarks/plan.py runs when, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from inference_kit.children import Outcome, run_child
from inference_kit.materials import Material, make_files, material
from narrowboat.errors import NarrowboatError
from narrowboat.plan.curve import budgets as spread
from plan_kit import children
from plan_kit.ablations import ABLATIONS

SHARES = (2.32, 5.81)  # of the weights: where schemes are compared
CURVE = 6  # budgets from the smallest to everything
SCHEMES = ("best", "swapnet", "first-resident", "window")
_TIMEOUT = 300.0
_AT_LEAST = 1.15  # of the smallest budget, where a share of the weights lies below it


@dataclass
class Model:
    """One model, what is to be measured of it, and how much.

    Attributes:
        name: of the zoo.
        rounds: how often each child runs, in turns with the others.
        passes: measured in each.
        ablations: also take one idea away at a time.
    """

    name: str
    rounds: int
    passes: int
    ablations: bool = False


MODELS = {
    "resnet101": Model("resnet101", 3, 7, ablations=True),
    "yolov3": Model("yolov3", 2, 5),
    "fcn": Model("fcn", 2, 5),
    "vgg19": Model("vgg19", 2, 5),
    "vit_large": Model("vit_large", 2, 5, ablations=True),
}


@dataclass
class Campaign:
    """Measures one model.

    Attributes:
        model: what is measured.
        work: folder for weights files and logs.
        say: takes a line of progress.
        curve, schemes, ablations: which parts.
    """

    model: Model
    work: Path
    say: Callable[[str], None]
    curve: bool = True
    schemes: bool = True
    ablations: bool = True
    rows: list[dict[str, Any]] = field(default_factory=list)

    def run(self) -> dict[str, Any]:
        """Everything measured, as JSON values."""
        name = self.model.name
        files = material(name, self.work)
        self._child("files", lambda emit: make_files(files, pth=False, groups=False), "")
        profile = self._child("profile", lambda emit: children.profile(emit, files), "profile")
        facts = self._child("facts", lambda emit: children.facts(emit, files), "facts")
        self.say(f"{name}: profile {profile['seconds'] * 1e3:.0f} ms per pass, {profile['contention']:.0%} contention")
        cells = self._cells(facts)
        for number in range(self.model.rounds):
            self._resident(files, number)
            for budget, label, scheme, ablation in cells:
                self._plan(files, number, budget, label, scheme, ablation)
            self._resident(files, number)
        return {"model": name, "profile": profile, "facts": facts, "rows": self.rows}

    def _cells(self, facts: dict[str, Any]) -> list[tuple[int, str, str, str]]:
        cells: list[tuple[int, str, str, str]] = []
        least, enough, weights = facts["minimum"], facts["enough"], facts["weights"]
        if self.curve:
            cells += [(nbytes, "curve", "best", "") for nbytes in spread(least, enough, CURVE)]
        for share in SHARES:
            nbytes = max(int(weights / share), int(least * _AT_LEAST))
            label = f"1/{share}" if nbytes == int(weights / share) else f"1/{share}, raised"
            if self.schemes:
                cells += [(nbytes, label, scheme, "") for scheme in SCHEMES]
            if self.ablations and self.model.ablations:
                cells += [(nbytes, label, "best", ablation) for ablation in ABLATIONS if ablation]
                if not self.schemes:
                    cells.append((nbytes, label, "best", ""))
        return cells

    def _resident(self, files: Material, number: int) -> None:
        passes = self.model.passes
        found = self._child("resident", lambda emit: children.everything_in(emit, files, passes), "resident")
        self.rows.append({"kind": "resident", "round": number, **found})

    def _plan(self, files: Material, number: int, budget: int, label: str, scheme: str, ablation: str) -> None:
        body = partial(
            children.run_plan, files=files, budget=budget, scheme=scheme, ablation=ablation, passes=self.model.passes
        )
        what = f"{self.model.name} {label} {budget >> 20} MiB {scheme} {ablation}"
        try:
            found = self._child(what, body, "plan")
        except NarrowboatError as error:
            found = {"refused": str(error)}
            self.say(f"{what}: {error}")
        else:
            self.say(
                f"{what}: foreseen {found['foreseen'] * 1e3:.0f}, predicted {found['predicted'] * 1e3:.0f}, "
                f"measured {found['seconds'] * 1e3:.0f} ms, {found['policy']}"
            )
        key = {"kind": "plan", "round": number, "budget": budget, "label": label}
        self.rows.append({**key, "scheme": scheme, "ablation": ablation, **found})

    def _child(self, what: str, body: Callable[..., None], event: str) -> dict[str, Any]:
        outcome: Outcome = run_child(body, log=self.work / "logs" / "plan.jsonl", timeout=_TIMEOUT)
        if outcome.status != "ok":
            raise NarrowboatError(f"{what}: {outcome.detail}")
        found = outcome.event(event) or {}
        return {key: value for key, value in found.items() if key != "event"}


def live_changes(name: str, work: Path, passes: int, count: int) -> dict[str, Any]:
    """Random changes of the budget of one model while it runs."""
    files = material(name, work)
    campaign = Campaign(Model(name, 1, 1), work, print)
    campaign._child("files", lambda emit: make_files(files, pth=False, groups=False), "")
    campaign._child("profile", lambda emit: children.profile(emit, files), "profile")
    facts = campaign._child("facts", lambda emit: children.facts(emit, files), "facts")
    # Passes may show that they need more than was thought, and the smallest budget grows by it.
    lowest, highest = int(facts["minimum"] * 1.2), facts["enough"]
    found = campaign._child("live", lambda emit: children.live(emit, files, lowest, highest, passes, count), "live")
    return {"model": name, "lowest": lowest, "highest": highest, **found}
