"""A small Llama and its tokenizer, built from texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_lightning.errors import UserError
from rlhf_lightning.files import build_once
from rlhf_lightning.ops.seeding import derive_seed

SPECIALS = ["<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|system|>{{ tools | tojson }}{{ eos_token }}{% endif %}{% for message in messages %}"
    "<|{{ message['role'] }}|>"
    "{% if message['reasoning_content'] %}<think>{{ message['reasoning_content'] }}</think>{% endif %}"
    "{{ message['content'] }}{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_config(
    vocab_size: int, hidden_size: int, layers: int, heads: int, max_length: int, **more: Any
) -> LlamaConfig:
    """Return the configuration of the small Llama of these sizes."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        # not 0.02: with 128 dimensions the residual stream would start too small to train within a minute
        initializer_range=hidden_size**-0.5 / 2,
        **more,
    )


def build_tiny(
    folder: str | Path,
    texts: Iterable[str] | Callable[[], Iterable[str]],
    vocab_size: int = 1024,
    hidden_size: int = 128,
    layers: int = 4,
    heads: int = 4,
    max_length: int = 512,
    seed: int = 0,
    cache: str | Path | None = None,
) -> str:
    """Write a Llama with random weights and a byte-level BPE tokenizer trained on `texts`; return the folder.

    The defaults give about a million parameters. An existing folder is returned as it is.

    Args:
        texts: or a function that returns them, called when the tokenizer is not in the cache.
        cache: where the tokenizer of these texts and this vocabulary is kept, None to train it.
    """
    if hidden_size % (2 * heads):
        raise UserError(f"model.build.hidden_size={hidden_size} is not a multiple of 2 x model.build.heads={heads}")
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return str(folder)
    if cache is not None:
        cache = Path(cache)
        build_once(cache, lambda place: _train(texts, vocab_size).save(str(place / "tokenizer.json")))
    bpe = Tokenizer.from_file(str(cache / "tokenizer.json")) if cache else _train(texts, vocab_size)
    tokenizer: Any = _wrapped(bpe, max_length)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = tiny_config(len(tokenizer), hidden_size, layers, heads, max_length, **special)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "tiny"))
        model = LlamaForCausalLM(config)
    build_once(folder, lambda place: (model.save_pretrained(place), tokenizer.save_pretrained(place)))
    return str(folder)


def _train(texts: Iterable[str] | Callable[[], Iterable[str]], vocab_size: int) -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts() if callable(texts) else texts, trainer)
    return bpe


def _wrapped(bpe: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
