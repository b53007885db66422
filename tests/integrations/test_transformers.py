"""A budgeted transformers.Trainer: the plain Trainer's bits, in fewer bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from narrowboat.errors import BudgetError, UsageError

transformers = pytest.importorskip("transformers", reason="the Trainer integration needs transformers")
pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")

from narrowboat.integrations.transformers import use_budget  # noqa: E402

SMALLEST: dict[str, int] = {}


class Texts(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Rows of random tokens, some of which are no targets."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(0, 64, (96,), generator=torch.Generator().manual_seed(index))
        labels = ids.clone()
        labels[: index % 40] = -100
        return {"input_ids": ids, "labels": labels}


def model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=64, n_positions=96)
        return transformers.GPT2LMHeadModel(config)
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 192}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes, **heads))


def trainer(folder: Path, kind: str, **options: Any) -> Any:
    settings = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.5,
        "lr_scheduler_type": "cosine",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **options,
    }
    args = transformers.TrainingArguments(output_dir=str(folder), **settings)
    return transformers.Trainer(model=model(kind), args=args, train_dataset=Texts())


def told(run: Any) -> list[Any]:
    """What the Trainer logged of losses, norms and rates, and the weights."""
    names = ("loss", "grad_norm", "learning_rate")
    return [{name: entry.get(name) for name in names} for entry in run.state.log_history[:-1]]


def same_weights(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def smallest(folder: Path, kind: str, options: dict[str, Any]) -> int:
    """About the smallest budget, as the Trainer tells it; units, and so minima, follow measured times."""
    key = f"{kind} {options}"
    if key not in SMALLEST:
        refused = trainer(folder, kind, **options)
        use_budget(refused, budget=1)
        with pytest.raises(BudgetError) as error:
            refused.train()
        SMALLEST[key] = error.value.minimum * 11 // 10
    return SMALLEST[key]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt2", {}),
        ("llama", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
        ("gpt2", {"bf16": True}),
    ],
    ids=["dropout", "accumulated", "bfloat16"],
)
def test_losses_norms_and_weights_are_the_plain_trainers(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    plain, budgeted = trainer(tmp_path, kind, **options), trainer(tmp_path, kind, **options)
    planned = use_budget(budgeted, budget=smallest(tmp_path, kind, options))
    for run in (plain, budgeted):
        torch.manual_seed(7)
        run.train()
    assert planned.plan.step is not None, "it recomputes"
    assert planned.departed == ""
    assert told(budgeted) == told(plain)
    assert same_weights(budgeted, plain)


def test_training_goes_on_from_a_saved_state(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1}
    whole, resumed = trainer(tmp_path / "one", "gpt2", **options), trainer(tmp_path / "two", "gpt2", **options)
    for run in (whole, resumed):
        use_budget(run, budget=smallest(tmp_path, "gpt2", {}))
    torch.manual_seed(7)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-1"))
    assert same_weights(whole, resumed)


def test_optimizer_state_counts(tmp_path: Path) -> None:
    run = trainer(tmp_path, "gpt2", max_steps=1)
    planned = use_budget(run, budget="1GiB")
    run.train()
    weights = sum(parameter.numel() * 4 for parameter in run.model.parameters())
    assert planned.plan.static.optimizer >= 2 * weights


def test_evaluation_runs_the_plain_model_and_closing_ends_the_plan(tmp_path: Path) -> None:
    run = trainer(tmp_path, "gpt2")
    planned = use_budget(run, budget="1GiB")
    found = run.evaluate(Texts())
    assert planned.planned == 0
    planned.close()
    assert run.evaluate(Texts())["eval_loss"] == found["eval_loss"]
    assert "forward" not in run.model.__dict__


def test_a_trainer_that_recomputes_by_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes its place"):
        use_budget(trainer(tmp_path, "gpt2", gradient_checkpointing=True), budget="24MiB")
