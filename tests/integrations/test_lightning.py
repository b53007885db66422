"""A budgeted Lightning run: the plain run's bits, in fewer bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrowboat.errors import BudgetError, UsageError

lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed: pip install lightning")

from narrowboat.integrations.lightning import NarrowboatCallback  # noqa: E402


class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined, unused-ignore]
    """Convolutions with BatchNorm and dropout; ``called`` says how training_step calls them."""

    def __init__(self, called: str = "net") -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = [
            [nn.Conv2d(c, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.1)] for c in (3, 16, 16)
        ]
        self.net = nn.Sequential(*(layer for block in blocks for layer in block), nn.Flatten(), nn.Linear(16384, 5))
        self.criterion = nn.CrossEntropyLoss()
        self.called = called
        self.losses: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: Any, index: int) -> Tensor:
        images, classes = batch
        loss: Tensor = self.criterion(self(images) if self.called == "self" else self.net(images), classes)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("error", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def data() -> Any:
    torch.manual_seed(1)
    rows = torch.utils.data.TensorDataset(torch.randn(64, 3, 32, 32), torch.randint(0, 5, (64,)))
    return torch.utils.data.DataLoader(rows, batch_size=32)


def fit(folder: Path, module: Any, *callbacks: Any, **options: Any) -> Any:
    torch.manual_seed(2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    run = lightning.Trainer(
        max_epochs=2,
        default_root_dir=folder,
        enable_checkpointing=False,
        callbacks=list(callbacks),
        **quiet,
        **options,
    )
    run.fit(module, data(), data())
    return module


class Watch(lightning.Callback):  # type: ignore[misc, name-defined, unused-ignore]
    """Keeps the plan of the last batch."""

    def __init__(self, callback: NarrowboatCallback) -> None:
        self.callback = callback
        self.plan: Any = None

    def on_train_batch_end(self, *_: Any) -> None:
        assert self.callback.planned is not None
        self.plan = self.callback.planned.plan


def smallest(folder: Path) -> int:
    """About the smallest budget, as a refusal tells it; units, and so minima, follow measured times."""
    with pytest.raises(BudgetError) as refused:
        fit(folder, Classifier(), NarrowboatCallback(1))
    return refused.value.minimum * 11 // 10


@pytest.mark.parametrize("called", ["net", "self"])
def test_losses_and_weights_are_the_plain_runs(tmp_path: Path, called: str) -> None:
    callback = NarrowboatCallback(smallest(tmp_path))
    watch = Watch(callback)
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    plain = fit(tmp_path, Classifier(called), **options)
    budgeted = fit(tmp_path, Classifier(called), callback, watch, **options)
    assert watch.plan.step is not None, "it recomputes"
    assert watch.plan.static.optimizer > 0
    assert all(torch.equal(a, b) for a, b in zip(plain.losses, budgeted.losses, strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), budgeted.state_dict().values(), strict=True)
    )


def test_afterwards_the_module_is_as_it_was(tmp_path: Path) -> None:
    callback = NarrowboatCallback("1GiB")
    module = fit(tmp_path, Classifier(), callback)
    assert callback.planned is None
    assert "forward" not in module.net.__dict__
    smallest(tmp_path)


def test_a_network_that_training_step_goes_by_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name the submodule"):
        fit(tmp_path, Classifier("net"), NarrowboatCallback("1GiB", network=""))
    with pytest.raises(UsageError, match="it has net, criterion"):
        fit(tmp_path, Classifier(), NarrowboatCallback("1GiB", network="encoder"))
