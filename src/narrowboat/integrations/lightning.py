"""A Lightning ``Trainer`` inside a byte budget.

    Trainer(callbacks=[NarrowboatCallback(budget="2GiB")]).fit(module)

The network's forward pass runs on a recompute plan (:func:`narrowboat.checkpoint_plan`) while ``fit`` runs; everything
else is Lightning's own. No batch is split, so losses, gradients and weights are those of the plain run, bit by bit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from narrowboat.errors import UsageError
from narrowboat.train.recompute import PlannedForward

# The same library under two names, whose classes do not know each other: the one that is in use.
if "pytorch_lightning" in sys.modules and "lightning" not in sys.modules:
    from pytorch_lightning import Callback
else:
    try:
        from lightning.pytorch import Callback
    except ImportError:
        try:
            from pytorch_lightning import Callback
        except ImportError as error:
            raise ImportError("the Lightning callback needs Lightning: pip install lightning") from error


class NarrowboatCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Runs a LightningModule's network inside a budget during ``fit``.

    Args:
        budget: bytes for weights, buffers, gradients, optimizer state, the batch, and activations. An int, "2GiB", or
            "auto" (what the machine can spare).
        spill: a folder for activations; None for no storage.
        techniques: among "recompute", "reduce", "compact" and "spill"; None for all.
        network: the name of the submodule that ``training_step`` calls, "" for the LightningModule itself. None: its
            one child that has parameters, else itself.

    Attributes:
        planned: ``.plan``, ``.budget`` (settable); None outside ``fit``.
    """

    def __init__(
        self,
        budget: int | str,
        *,
        spill: str | Path | None = None,
        techniques: Iterable[str] | None = None,
        network: str | None = None,
    ) -> None:
        super().__init__()
        self._budget = budget
        self._spill = spill
        self._techniques = techniques
        self._network = network
        self.planned: PlannedForward | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the plan in place; it is made for the first batch.

        Raises:
            UsageError: there is no such submodule.
        """
        network = _network(pl_module, self._network)
        self.planned = PlannedForward(
            network, self._budget, spill=self._spill, techniques=self._techniques, optimizers=trainer.optimizers
        )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """See that the plan was used.

        Raises:
            UsageError: ``training_step`` went by the network that was planned.
        """
        if self.planned is not None and not self.planned.planned:
            raise UsageError(
                "training_step did not call the part of the LightningModule that was planned: name the submodule that "
                'it calls (network="name"), or network="" if it calls self(...)'
            )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Put the forward back, however ``fit`` ended."""
        if self.planned is not None:
            self.planned.close()
            self.planned = None


def _network(module: nn.Module, name: str | None) -> nn.Module:
    if name is None:
        children = [child for child in module.children() if any(True for _ in child.parameters())]
        own = any(True for _ in module.parameters(recurse=False))
        return children[0] if len(children) == 1 and not own else module
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        names = ", ".join(child for child, _ in module.named_children())
        raise UsageError(f"network={name!r}: the LightningModule has no such submodule; it has {names}") from error
