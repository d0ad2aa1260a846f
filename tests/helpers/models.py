"""Models small enough for any test."""

from __future__ import annotations

from transformers import LlamaConfig


def tiny_config(**changes: object) -> LlamaConfig:
    """Return the config of a Llama small enough for any test."""
    values: dict[str, object] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    return LlamaConfig(**(values | changes))  # type: ignore[arg-type]
