"""The real model, SmolLM2-135M: ``LLM`` against ``model.generate`` in float32, memory, the demo's answer.

In the usual run the 20 prompts get 16 tokens each, all together and starved of blocks; the reference
is ``model.generate`` on each prompt alone. The slow test is the full one: 128 tokens, and also alone.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from references import Float64Model, assert_errs_like_eager, assert_same_tokens, greedy_tokens
from small_llm import assert_idle
from torch import nn

from infercomp import LLM, SamplingParams, serving
from infercomp.demo_model import demo_model_path
from infercomp.loading.loader import load
from infercomp.runtime.engine import Engine
from infercomp.runtime.kv_pools import allocate_pools

FEW_TOKENS, MANY_TOKENS = 16, 128
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a small robot who",
    "def fibonacci(n):\n    ",
    "Q: What is 17 + 25?\nA:",
    "1, 1, 2, 3, 5, 8,",
    "Water boils at",
    "Dear Sir or Madam,\n\nI am writing to",
    "La capitale de l'Italie est",
    "In 1969, Neil Armstrong",
    "The three primary colours are red,",
    "SELECT name, age FROM users WHERE",
    "Die Hauptstadt von Deutschland ist",
    "A list of fruits:\n- apple\n- banana\n-",
    "🙂 means",
    "To be, or not to be,",
    "x",
    "The mitochondria is the powerhouse of the cell. Photosynthesis, in contrast, takes place in",
    '{"name": "Alice", "age":',
    "Translate to Spanish: Good morning ->",
    "The quick brown fox jumps over the lazy dog. " * 6,
)


@dataclass
class Served:
    """The model as transformers runs it, and as ``LLM`` does."""

    model: nn.Module
    tokenizer: Any
    llm: LLM

    def ids(self, prompt: str) -> list[int]:
        return self.tokenizer(prompt)["input_ids"]

    def greedy(self, prompts: tuple[str, ...], num_tokens: int, llm: LLM | None = None) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        outputs = (llm or self.llm).generate(list(prompts), params)
        return [output.outputs[0].token_ids for output in outputs]

    @functools.cached_property
    def exact(self) -> Float64Model:
        return Float64Model(self.model)


@pytest.fixture(scope="module")
def served() -> Served:
    """One copy of the weights for both: those that infercomp merges stay the model's own parameters."""
    loaded = load(demo_model_path())
    return Served(loaded.model, loaded.tokenizer, LLM(loaded.model, loaded.tokenizer, num_blocks=400))


@pytest.fixture(scope="module")
def few_tokens(served: Served) -> list[list[int]]:
    return [greedy_tokens(served.model, served.ids(prompt), FEW_TOKENS) for prompt in PROMPTS]


def starved_llm(served: Served, num_tokens: int) -> LLM:
    """Blocks for two of the longest requests, so that others wait or are thrown out; the compiled step is shared."""
    longest = max(len(served.ids(prompt)) for prompt in PROMPTS) + num_tokens
    runtime = dataclasses.replace(served.llm.config.runtime, num_blocks=2 * longest // 8, block_size=8)
    step = served.llm._served
    pools = allocate_pools(step.form.cache_specs, runtime.num_blocks, runtime.block_size)
    starved = copy.copy(served.llm)
    starved.num_blocks = runtime.num_blocks
    starved._engine = Engine(
        step.with_pools(pools),
        runtime,
        num_blocks=runtime.num_blocks,
        max_model_len=starved.max_model_len,
        eos_token_ids=starved.eos_token_ids,
        tokenizer=served.tokenizer,
        vocab_size=step.form.vocab_size,
    )
    return starved


def assert_all_same(served: Served, expected: list[list[int]], found: list[list[int]]) -> None:
    for prompt, one, other in zip(PROMPTS, expected, found, strict=True):
        assert_same_tokens(served.model, lambda: served.exact, served.ids(prompt), one, other)


def test_all_prompts_together(served: Served, few_tokens: list[list[int]]) -> None:
    assert_all_same(served, few_tokens, served.greedy(PROMPTS, FEW_TOKENS))
    assert served.llm.stats.num_preemptions == 0
    assert_idle(served.llm)


def test_all_prompts_with_few_blocks(served: Served, few_tokens: list[list[int]]) -> None:
    starved = starved_llm(served, FEW_TOKENS)
    assert_all_same(served, few_tokens, served.greedy(PROMPTS, FEW_TOKENS, starved))
    assert starved.stats.num_preemptions > 0
    assert_idle(starved)


@pytest.mark.slow
def test_many_tokens_alone_together_and_with_few_blocks(served: Served) -> None:
    expected = [greedy_tokens(served.model, served.ids(prompt), MANY_TOKENS) for prompt in PROMPTS]
    assert_all_same(served, expected, [served.greedy((prompt,), MANY_TOKENS)[0] for prompt in PROMPTS])
    assert_all_same(served, expected, served.greedy(PROMPTS, MANY_TOKENS))
    starved = starved_llm(served, MANY_TOKENS)
    assert_all_same(served, expected, served.greedy(PROMPTS, MANY_TOKENS, starved))
    assert starved.stats.num_preemptions > 0


def test_the_prompts_are_varied(served: Served) -> None:
    assert len(set(PROMPTS)) == 20
    assert len({len(served.ids(prompt)) for prompt in PROMPTS}) >= 8


def test_the_demos_answer(served: Served) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    output = served.llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)).outputs[0]
    encoded = served.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    prompt = list(encoded["input_ids"])
    expected = greedy_tokens(served.model, prompt, 32)
    assert_same_tokens(served.model, lambda: served.exact, prompt, expected, output.token_ids)
    assert "Paris" in output.text


def test_logits_err_like_eagers(served: Served) -> None:
    tokens = served.ids(PROMPTS[16])
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        eager = served.model(input_ids=ids).logits[0]
    assert_errs_like_eager(served.exact(input_ids=ids).logits[0], eager, served.llm.logits(tokens))


def test_no_length_is_captured_anew(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("captured again")

    monkeypatch.setattr(torch.export, "export", refuse)
    monkeypatch.setattr(serving, "lower_graph", refuse)
    for prompt in (PROMPTS[15], PROMPTS[19]):
        assert len(served.greedy((prompt,), 2)[0]) == 2


def test_no_second_copy_of_the_weights(served: Served) -> None:
    parameters = list(served.model.parameters())
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in parameters}
    assert sum(storages.values()) == sum(each.numel() * each.element_size() for each in parameters)
    large = [tensor for tensor in served.llm._served._bound._weights if tensor.numel() > 1 << 16]
    num_large = len(large)
    num_copied = sum(tensor.untyped_storage().data_ptr() not in storages for tensor in large)
    assert num_large > 60 and num_copied == 0  # counted before: a failure would print every weight


# VmHWM and not ru_maxrss, which a child process inherits from the parent that it was forked from.
MEMORY_PROGRAM = """
import infercomp
from infercomp.demo_model import demo_model_path
llm = infercomp.LLM(demo_model_path(), kv_cache_bytes=64 << 20)
output = llm.generate("The capital of France is", infercomp.SamplingParams(max_tokens=8, temperature=0.0))[0]
assert len(output.outputs[0].token_ids) == 8
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""


def test_peak_memory(served: Served) -> None:
    """At most 1.5 times the weights in float32, the cache, and 600 MiB for Python, torch and transformers."""
    run = subprocess.run([sys.executable, "-c", MEMORY_PROGRAM], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    peak = int(run.stdout.split()[-1]) << 10
    weights = sum(parameter.numel() * parameter.element_size() for parameter in served.model.parameters())
    allowed = 1.5 * weights + (64 << 20) + (600 << 20)
    assert peak <= allowed, f"{peak >> 20} MiB where {int(allowed) >> 20} MiB are allowed"
