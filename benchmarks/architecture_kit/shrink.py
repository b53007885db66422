"""Make a configuration small without knowing the model: every width by one factor, few layers, few words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

VOCAB = 160
_MOST = 4  # layers kept where the kinds of layer differ

_LAYERS = re.compile(
    r"^(num_hidden_layers|n_layers?|num_layers|layers|depths?|encoder_depth|decoder_depth|encoder_layers|"
    r"decoder_layers|num_encoder_layers|num_decoder_layers|\w+_num_hidden_layers|\w+_num_layers|num_\w+_layers|"
    r"\w*_encoder_layers|\w*_decoder_layers|num_\w*blocks|num_blocks|stage_num_blocks|layers_num|resampler_depth|"
    r"\w+_n_layers?|block_repeats|num_block_repeats|expert_num_layers)$"
)
_NOT_LAYERS = re.compile(r"feat_extract|conv_layers|kv_shared|nextn|num_dense_layers|upscale_blocks|random_blocks|fov")
_WIDTH = re.compile(
    r"(hidden_size|hidden_sizes|hidden_dim|d_model|embed_dim|embed_dims|emb_dim|n_embd|n_inner|intermediate|ffn_dim|"
    r"ffn_hidden|mlp_dim|mlp_hidden|head_dim|d_kv|d_ff|d_inner|d_head|dim_feedforward|feedforward_dim|"
    r"projection_dim|projection_size|proj_dim|output_dim|out_dim|latent_dim|embedding_size|embedding_dim|lora_rank|"
    r"conv_dim|tdnn_dim|xvector_output_dim|classifier_proj_size|codevector_dim|kv_channels|width|rotary_dim|"
    r"hidden_channels|upsample_initial_channel|base_channels|lru_width|dim_ff|dim_head|query_dim|dim$|d_embed|"
    r"feature_dim|features_size|feature_size|pooler_output_size|linear_units|linear_size|out_channels|neck_channels|"
    r"n_embed|mamba_d_ssm|ssm_size|bottleneck|attention_hidden|fusion_hidden|key_head_dim|value_head_dim|num_filters|"
    r"filter_size|conv_channels|model_dim|stem_channels|layer_channels|encoder_in_channels|decoder_in_channels|dff)"
)
_NOT_WIDTH = re.compile(
    r"^(num_|max_|min_)|input_dim$|in_dim$|vocab|patch|image_size|kernel|bbox|codebook_dim|act_dim"
)
_HEAD_COUNT = re.compile(r"(^num_\w*heads|^n_heads?|_heads|key_value_heads)$")
_HEAD_WIDTH = re.compile(r"head_dim|d_kv|d_head|dim_head|rotary_dim|qk_rope|kv_channels")
_EXPERTS = re.compile(
    r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts|n_experts|"
    r"num_total_experts|ffn_num_experts)$"
)
_TOP_K = re.compile(
    r"^(num_experts_per_tok|num_experts_per_token|top_k_experts|moe_topk|moe_top_k|moe_k|num_selects)$"
)
_TOKEN = re.compile(r"(token_id|token_index|token_ids|_token|_idx|eos_id|bos_id|pad_id|boi_id|eoi_id)$")
_PICKED = re.compile(r"(indexes|indices|_layers_ids|hook_ids|layer_idx|layer_ids|mlp_only_layers|feature_layers?)$")


@dataclass(frozen=True)
class Profile:
    """How small: what widths are divided by, layers kept (None: all), side of square images (None: as they are).

    ``fewer_heads``: divide the number of heads where otherwise each head is made narrower.
    """

    factor: int
    layers: int | None
    side: int | None
    fewer_heads: bool = False


PROFILES = (
    Profile(16, 2, 64),
    Profile(8, 2, 64),
    Profile(4, 2, 64),
    Profile(8, None, 64),
    Profile(8, 2, None),
    Profile(2, 2, 64),
    Profile(4, None, None),
    Profile(1, 2, 64),
    Profile(1, 2, None),
    Profile(1, None, None),
    Profile(16, 2, 64, fewer_heads=True),
    Profile(8, 2, 64, fewer_heads=True),
    Profile(4, 2, 64, fewer_heads=True),
)


def shrink(config: Any, profile: Profile, tokens: dict[int, int] | None = None) -> Any:
    """Shrink a transformers configuration in place, nested ones too; returns it.

    Args:
        config: a configuration with its default values.
        profile: how small.
        tokens: old token number -> new one, shared by the nested configurations.
    """
    tokens = {} if tokens is None else tokens
    _fill_in(config)
    kinds = config.__dict__.get("layer_types") or config.__dict__.get("layers_block_type")
    layers = profile.layers
    chosen: list[int] | None = None
    if layers is not None and isinstance(kinds, (list, tuple)) and kinds:
        distinct = list(dict.fromkeys(kinds))[:_MOST]
        chosen = sorted({kinds.index(kind) for kind in distinct} | set(range(min(layers, len(kinds)))))[:_MOST]
        layers = len(chosen)
    count = len(kinds) if chosen is not None else _first_int(config, ("num_hidden_layers", "n_layer", "num_layers"))
    for name, value in list(config.__dict__.items()):
        if name in ("id2label", "label2id", "_commit_hash", "transformers_version", "attribute_map"):
            continue
        new = _shrunk(config, name, value, profile, layers, chosen, count, tokens)
        if new is not value:
            _set(config, name, new)
    return config


def _shrunk(
    config: Any,
    name: str,
    value: Any,
    profile: Profile,
    layers: int | None,
    chosen: list[int] | None,
    count: int | None,
    tokens: dict[int, int],
) -> Any:
    if hasattr(value, "model_type") and hasattr(value, "to_dict"):
        return small_resnet() if value.model_type == "timm_backbone" else shrink(value, profile, tokens)
    if name == "use_timm_backbone":
        return False
    if isinstance(value, dict):
        if name.startswith("rope") and profile.factor > 1 and not profile.fewer_heads:
            return {
                k: [max(x // profile.factor, 1) for x in v]
                if isinstance(v, (list, tuple)) and k.endswith("section")
                else v
                for k, v in value.items()
            }
        return value
    if isinstance(value, bool) or value is None or isinstance(value, (str, float)):
        return value
    if isinstance(value, (list, tuple)):
        if chosen is not None and count is not None and len(value) == count and count > len(chosen):
            return type(value)(value[i] for i in chosen)
        if layers is not None and count is not None and count > layers and len(value) == count and chosen is None:
            return type(value)(value[:layers])
        if layers is not None and _LAYERS.search(name) and not _NOT_LAYERS.search(name) and _ints(value):
            return type(value)(min(v, layers) for v in value)
        if layers is not None and _PICKED.search(name) and _ints(value) and max(value, default=0) >= layers:
            return type(value)(sorted({min(v, layers - 1) for v in value}))
        if _TOKEN.search(name) and _ints(value):
            return type(value)(_token(v, tokens) for v in value)
        if _WIDTH.search(name) and not _NOT_WIDTH.search(name) and _ints(value):
            return type(value)(_narrow(v, profile.factor) for v in value)
        if name == "image_size" and _ints(value) and profile.side:
            return type(value)(_side(config, v, profile.side) for v in value)
        return value
    if not isinstance(value, int):
        return value
    if "vocab_size" in name or name in ("n_vocab", "vocab"):
        return min(value, VOCAB)
    if _TOKEN.search(name):
        return _token(value, tokens)
    if _EXPERTS.search(name):
        return min(value, 4)
    if _TOP_K.search(name):
        return min(value, 2)
    if name in ("n_group", "topk_group", "num_expert_group"):
        return 1
    if layers is not None:
        if _LAYERS.search(name) and not _NOT_LAYERS.search(name):
            return min(value, layers)
        if name in ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"):
            return min(value, 1)
        if name.endswith(("_period", "_interval", "_every_n_layers")):
            return min(value, 2)
        if name.endswith("layer_offset"):
            return min(value, 1)
        if name in ("num_kv_shared_layers", "num_nextn_predict_layers"):
            return min(value, 1) if name.startswith("num_next") else 0
        if name.endswith("feature_layer") and value >= layers:
            return layers - 1
        if name.endswith("feature_layer") and value < -layers:
            return -layers
    if name in ("image_size", "spatial_size", "input_size") and profile.side and value >= 128:
        return _side(config, value, profile.side)
    if profile.fewer_heads and _HEAD_COUNT.search(name):
        return max(value // profile.factor, 1)
    if profile.fewer_heads and _HEAD_WIDTH.search(name):
        return value
    if _WIDTH.search(name) and not _NOT_WIDTH.search(name):
        return _narrow(value, profile.factor)
    return value


def _fill_in(config: Any) -> None:
    """Head counts and widths that a published configuration always states, but the class leaves open."""
    values = config.__dict__
    heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
    if isinstance(heads, int) and isinstance(hidden, int):
        if "num_key_value_heads" in values and values["num_key_value_heads"] is None:
            _set(config, "num_key_value_heads", heads)
        if "head_dim" in values and values["head_dim"] is None:
            _set(config, "head_dim", hidden // heads)


def small_resnet() -> Any:
    """A backbone for the models whose own is one of timm's, which need not be installed."""
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 32, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def _narrow(value: int, factor: int) -> int:
    while factor > 1 and (value % factor or value // factor < 4):
        factor //= 2
    return value // factor if value >= 16 else value


def _side(config: Any, value: int, side: int) -> int:
    patch = config.__dict__.get("patch_size")
    patch = max(patch) if isinstance(patch, (list, tuple)) else patch
    if isinstance(patch, int) and patch > 0:
        return min(value, max(patch * 4, -(-side // patch) * patch))
    return min(value, side)


def _token(value: int, tokens: dict[int, int]) -> int:
    if value < 90:
        return value
    return tokens.setdefault(value, 100 + len(tokens))


def _ints(values: Any) -> bool:
    return len(values) > 0 and all(isinstance(v, int) and not isinstance(v, bool) for v in values)


def _first_int(config: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = config.__dict__.get(name)
        if isinstance(value, int):
            return value
    return None


def _set(config: Any, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except Exception:
        config.__dict__[name] = value
