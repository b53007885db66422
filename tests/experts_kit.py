"""Small models with expert stacks, of transformers' families and of a user's own making."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 192}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 192,
            "intermediate_size": 128,
            "shared_expert_intermediate_size": 96,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 96, "intermediate_size": 128},
    ),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 192}),
    "deepseek_v2": (
        "DeepseekV2",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 192,
            "intermediate_size": 128,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            **LATENT,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 192,
            "intermediate_size": 128,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "head_dim": 16,
            **LATENT,
        },
    ),
    "phimoe": ("Phimoe", {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 192}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 192}),
    "gpt_oss": ("GptOss", {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 192}),
}


def moe(folder: Path, family: str = "mixtral", *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Write a model of some 10 MB, most of it experts, into ``folder``: stacked, or each expert by itself.

    Returns:
        The plain model as transformers loads it.
    """
    import transformers

    shard = changes.pop("shard", "5GB")
    implementation = changes.pop("experts_implementation", None)
    one_by_one = changes.pop("one_by_one", False)
    name, sizes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **sizes, **changes})
    kind = getattr(transformers, f"{name}ForCausalLM")
    torch.manual_seed(7)
    made = kind(config).to(dtype)
    with torch.no_grad():
        for key, tensor in made.named_parameters():
            if "bias" not in key and "norm" not in key:
                tensor.copy_(torch.randn(tensor.shape) * tensor.shape[-1] ** -0.5)
    made.save_pretrained(folder, max_shard_size=shard, save_original_format=one_by_one)
    more = {"experts_implementation": implementation} if implementation else {}
    plain = kind.from_pretrained(folder, dtype="auto", **more).eval()
    with torch.no_grad():
        for tensor in plain.parameters():  # loading leaves them unaligned, and kernels choose their path by that
            tensor.data = tensor.data.clone()
    return plain


class Bank(nn.Module):
    """A user's own experts: two stacks, and a loop over those that were chosen."""

    def __init__(self, count: int = 8, width: int = 128, inner: int = 320) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(count, inner, width))
        self.down = nn.Parameter(torch.empty(count, width, inner))
        nn.init.normal_(self.up, std=width**-0.5)
        nn.init.normal_(self.down, std=inner**-0.5)

    def forward(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for expert in chosen.unique():
            rows = (chosen == expert).nonzero()[:, 0]
            out[rows] += torch.relu(x[rows] @ self.up[expert].T) @ self.down[expert].T
        return out


class Layers(nn.Module):
    """Some layers of a router and a bank each."""

    def __init__(self, depth: int = 3, count: int = 8, top: int = 2, bank: type[nn.Module] = Bank) -> None:
        super().__init__()
        self.top = top
        self.routers = nn.ModuleList(nn.Linear(128, count) for _ in range(depth))
        self.banks = nn.ModuleList(bank(count) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for router, bank in zip(self.routers, self.banks, strict=True):
            x = x + bank(x, router(x).topk(self.top, dim=-1).indices)
        return x


class Gathered(Bank):
    """Experts by a gather: every token brings the matrices it wants."""

    def forward(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        inner = torch.relu(torch.einsum("nkih,nh->nki", self.up[chosen], x))
        return torch.einsum("nkhi,nki->nh", self.down[chosen], inner)


class Grouped(Bank):
    """Experts by products of groups, as transformers runs them by default."""

    def forward(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        ids, order = chosen.reshape(-1).sort()
        rows = x[order // chosen.shape[-1]]
        count = self.up.shape[0]
        ends = torch.histc(ids.float(), bins=count, min=0, max=count - 1).cumsum(0).int()
        inner = torch.relu(torch.nn.functional.grouped_mm(rows, self.up.transpose(-2, -1), offs=ends))
        out = torch.nn.functional.grouped_mm(inner, self.down.transpose(-2, -1), offs=ends)
        return out[order.argsort()].view(*chosen.shape, -1).sum(1)


class Wide(nn.Module):
    """Layers of experts behind two linear layers larger than any expert."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(128, 8192)
        self.second = nn.Linear(8192, 128)
        self.layers = Layers(bank=Grouped)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(self.second(self.first(x).relu()))
