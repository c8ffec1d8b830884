"""A tiny model with a tokenizer over bytes, for tests of what ``LLM`` does with requests and text."""

from __future__ import annotations

import torch
import transformers
from families import FAMILIES, NUM_POSITIONS, enliven
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from infercomp import LLM

END_OF_TEXT = "<|end|>"


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a byte and one special token, so that most characters beyond ASCII are split over tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


def byte_model() -> nn.Module:
    """A llama over the tokenizer's vocabulary whose text, greedy or drawn, wanders about."""
    torch.manual_seed(0)
    arguments = {
        **FAMILIES["llama"].config_arguments,
        "vocab_size": len(byte_tokenizer()),
        "bos_token_id": None,
        "eos_token_id": byte_tokenizer().eos_token_id,
        "max_position_embeddings": NUM_POSITIONS,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**arguments, attn_implementation="sdpa"))
    enliven(model)
    return model.eval().requires_grad_(False)


def make_llm(**options: object) -> LLM:
    return LLM(byte_model(), byte_tokenizer(), **{"num_blocks": 64, "block_size": 4, **options})


def assert_idle(llm: LLM) -> None:
    """No request is left, every block is free and the ledger is sound."""
    engine = llm._engine
    assert not engine.has_unfinished_requests()
    assert engine.scheduler.pool.num_used_blocks == 0
    engine.scheduler.check_integrity()
