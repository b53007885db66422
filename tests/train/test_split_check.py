"""What may be split is told from what may not, and trying it leaves no trace."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from narrowboat.errors import LossError
from narrowboat.train.loss import LossPlan, split_batch
from narrowboat.train.loss_trace import plan_loss
from narrowboat.train.split_check import SplitVerdict, check_splits


def info_nce(out: Tensor, y: Tensor) -> Tensor:
    out = F.normalize(out)
    return F.cross_entropy(out @ out.T / 0.1, torch.arange(len(out)).roll(1))


def masked_mean(out: Tensor, y: Tensor) -> Tensor:
    mask = (y > 0).to(out.dtype)
    return (out.square().mean(1) * mask).sum() / mask.sum().clamp(min=1)


def net(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), *more, nn.Linear(8, 4))


def verdict(model: nn.Module, loss_fn: Any, samples: int = 8, **options: Any) -> SplitVerdict:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(samples, 3, generator=generator), torch.arange(samples) % 4
    return check_splits(model, loss_fn, x, y, plan_loss(model, loss_fn, x, y), **options)


@pytest.mark.parametrize("copy_limit", [64 << 20, 0], ids=["float64 copy", "itself"])
@pytest.mark.parametrize(
    "model",
    [
        net(),
        net(nn.Dropout(0.5), nn.BatchNorm1d(8)),
        net(nn.BatchNorm1d(8, track_running_stats=False), nn.LayerNorm(8)),
        net(nn.Linear(8, 8), nn.RReLU()),
        nn.Sequential(nn.Unflatten(1, (3, 1)), nn.LSTM(1, 8, num_layers=2, dropout=0.5, batch_first=True)),
    ],
    ids=["mlp", "dropout and norm", "bare norm", "random activation", "lstm"],
)
def test_means_over_samples_are_additive(model: nn.Module, copy_limit: int) -> None:
    lstm = isinstance(model[-1], nn.LSTM)

    def loss_fn(out: Any, y: Tensor) -> Tensor:
        return F.cross_entropy((out[0][:, -1] if lstm else out), y)

    found = verdict(model, loss_fn, copy_limit=copy_limit)
    assert found.kind == "additive" and found and not found.moving, found
    assert found.error is not None and found.error < (1e-12 if copy_limit else 1e-5)


@pytest.mark.parametrize("copy_limit", [64 << 20, 0], ids=["float64 copy", "itself"])
def test_contrastive_losses_are_coupled(copy_limit: int) -> None:
    found = verdict(net(), info_nce, copy_limit=copy_limit)
    assert found.kind == "coupled" and not found and "other samples" in found.reason, found


def test_a_wrong_weight_is_told_from_a_coupled_loss() -> None:
    found = verdict(net(), masked_mean)
    assert found.kind == "coupled" and "count=" in found.reason, found
    x, y = torch.randn(8, 3), torch.arange(8) % 4
    plan = plan_loss(net(), masked_mean, x, y, count=lambda inputs, targets: (targets > 0).sum())
    assert check_splits(net(), masked_mean, x, y, plan)
    assert not check_splits(net(), nn.CrossEntropyLoss(), x, y, LossPlan("sum", "a lie"))


def test_buffers_that_move_with_every_pass_are_named() -> None:
    model = nn.Sequential(spectral_norm(nn.Linear(3, 8)), nn.Linear(8, 4))
    found = verdict(model, nn.CrossEntropyLoss())
    assert found.moving  # the power iteration has converged, so that one step more makes little difference
    for vector in model[0].parametrizations.weight[0].buffers():
        vector.copy_(F.normalize(torch.randn_like(vector), dim=0))
    found = verdict(model, nn.CrossEntropyLoss())
    assert found.kind == "coupled" and "moves with every forward pass" in found.reason
    assert any("parametrizations.weight.0._u" in name for name in found.moving)


def test_what_cannot_be_compared_is_unknown() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.randn_like(x))

    assert "random" in verdict(Noisy(3, 4), nn.CrossEntropyLoss()).reason
    assert "one sample" in verdict(net(), nn.CrossEntropyLoss(), samples=1).reason
    assert "zero" in verdict(net(), lambda out, y: (out * 0).sum()).reason
    assert "no parameter" in verdict(net().requires_grad_(False), nn.CrossEntropyLoss()).reason

    class Fixed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).view(4, 4)

    found = check_splits(Fixed(3, 4), F.mse_loss, torch.randn(4, 3), torch.randn(4, 4), LossPlan("samples", ""))
    assert found.kind == "unknown" and "RuntimeError" in found.reason
    with pytest.raises(LossError):
        check_splits(net(), lambda out, y: out, torch.randn(4, 3), torch.randn(4, 4), LossPlan("samples", ""))


@pytest.mark.parametrize("copy_limit", [64 << 20, 0], ids=["float64 copy", "itself"])
def test_a_check_leaves_gradients_buffers_modes_and_random_streams_as_they_were(copy_limit: int) -> None:
    model = nn.Sequential(
        net(nn.BatchNorm1d(8), nn.Dropout()),
        nn.BatchNorm1d(4, track_running_stats=False),
        spectral_norm(nn.Linear(4, 4)),
    )
    model[0][1].eval()
    model(torch.randn(4, 3)).sum().backward()

    def state() -> list[Any]:
        tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters()), torch.get_rng_state()]
        modes = [module.training for module in model.modules()]
        return [tensors, modes, random.getstate(), np.random.get_state()[1].tolist(), dict(model[1]._buffers)]  # type: ignore[index]

    before = [[tensor.clone() for tensor in state()[0]], *state()[1:]]
    identity = [buffer.data_ptr() for buffer in model.buffers()]
    verdict(model, nn.CrossEntropyLoss(), copy_limit=copy_limit)
    after = state()
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1:] == after[1:] and identity == [buffer.data_ptr() for buffer in model.buffers()]


def test_a_tiny_gpt2_with_ignored_labels_equals_its_parts() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).train()
    ids = torch.randint(50, (5, 9))
    labels = ids.clone()
    for row in range(5):
        labels[row, 9 - 2 * row :] = -100  # the first row keeps all, the last one target that the shift drops
    labels[0, :3] = -100
    batch = transformers.BatchEncoding({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    plan = plan_loss(model, None, batch, None)
    assert plan.rule == "targets" and "shifted" in plan.why
    found = check_splits(model, None, batch, None, plan)
    assert found.kind == "additive", found
    assert not check_splits(model, None, batch, None, LossPlan("samples", "wrong here"))

    model.eval().double()
    parameters = list(model.parameters())
    want = torch.autograd.grad(model(**batch).loss, parameters)
    parts = split_batch(batch, None, 3, plan)
    loss = sum(model(**part.inputs).loss * part.weight for part in parts)
    for got, whole in zip(torch.autograd.grad(loss, parameters), want, strict=True):
        torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-8)  # the loss itself is computed in float32


@pytest.mark.parametrize("seed", range(6))
def test_a_mean_over_a_mask_is_found_also_where_a_part_has_nothing_that_counts(seed: int) -> None:
    def masked(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        counts = target > 4
        return (torch.nn.functional.cross_entropy(output, target, reduction="none") * counts).sum() / counts.sum()

    torch.manual_seed(seed)
    model = torch.nn.Linear(8, 10)
    inputs, targets = torch.randn(64, 8), torch.randint(0, 10, (64,))
    plan = LossPlan("samples", "a guess")
    assert not check_splits(model, masked, inputs, targets, plan)
