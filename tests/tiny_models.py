"""Tiny models with random weights, one per kind of architecture; every size is a multiple of 8."""

from __future__ import annotations

import torch
import transformers


def tiny_llama(**overrides) -> transformers.LlamaForCausalLM:
    """Three layers, gated MLP, grouped-query attention."""
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **overrides}))


def token_batch(batch_size: int = 2, num_tokens: int = 12, *, num_padding: int = 3, seed: int = 1) -> dict:
    """Random tokens with labels; the last sample ends in padding."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1, 64, (batch_size, num_tokens), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    if num_padding:
        attention_mask[-1, -num_padding:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per word, 64 words; padding is token 0."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", *(f"w{i}" for i in range(35))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
