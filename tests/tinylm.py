"""Tiny causal language models with random weights and a tokenizer, made on the spot: no hub, no package."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

Family = Literal["llama", "gemma3"]


@functools.cache
def tokenizer() -> Any:
    """Letters as tokens, with a beginning and an end of text, and no padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *letters])}
    found = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=found, bos_token="<s>", eos_token="</s>")


def language_model(family: Family = "llama", *, context: int = 512, seed: int = 0) -> Any:
    """Two layers, 64 wide, 4 heads, in float32."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

    shape = {
        "vocab_size": 258,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "gemma3":
            kinds = ["sliding_attention", "full_attention"]
            return Gemma3ForCausalLM(
                Gemma3TextConfig(**shape, head_dim=16, sliding_window=context, layer_types=kinds)
            ).eval()
        return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def save(folder: Path, family: Family = "llama") -> Path:
    """As a folder that `clamp: {lm: FOLDER}` reads."""
    language_model(family).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
