"""Kernels guessed from a few layers: right for models of several kinds of layers, and nothing depends on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from references import greedy_tokens
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import infercomp
from infercomp.config import parse_options
from infercomp.kernel_prefetch import prefetch_kernels

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "vocab_size": 64, "max_position_embeddings": 64,
}  # fmt: skip
TOKENS = [3, 1, 4, 1, 5]
PROMPT = [{"prompt_token_ids": TOKENS}]
NUM_TOKENS = 6
GREEDY = infercomp.SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)


def _llama(num_layers: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=num_layers)).eval()


def _gemma3() -> nn.Module:
    """Every third layer sees all positions, the others a window."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(**SIZES, num_hidden_layers=10, sliding_window=8, sliding_window_pattern=3)
    return Gemma3ForCausalLM(config).eval()


class _Odd(nn.Module):
    """Does to its input what no layer before the fourth does, and says so nowhere."""

    def __init__(self, layer: nn.Module, layer_idx: int) -> None:
        super().__init__()
        self.layer, self.layer_idx = layer, layer_idx

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        result = self.layer(*args, **kwargs)
        return torch.sin(result) if self.layer_idx >= 3 else result


def _secretly_odd() -> nn.Module:
    model = _llama()
    model.model.layers = nn.ModuleList(_Odd(layer, i) for i, layer in enumerate(model.model.layers))
    return model


def _libraries(folder: Path) -> int:
    return len(list(folder.glob("*.so")))


@pytest.mark.parametrize("build", [pytest.param(_llama, marks=pytest.mark.slow), _gemma3])
def test_the_guess_is_the_library_that_lowering_wants(build: type, tmp_path: Path) -> None:
    options = {"codegen": "cpp", "cache_dir": str(tmp_path), "num_blocks": 16}
    model = build()
    guessed = prefetch_kernels(model, parse_options(options))
    assert guessed is not None
    library = guessed.result()
    expected = greedy_tokens(model, TOKENS, NUM_TOKENS)
    got = infercomp.LLM(model, **options).generate(PROMPT, GREEDY, use_tqdm=False)
    assert got[0].outputs[0].token_ids == expected
    assert library.exists() and _libraries(tmp_path) == 2  # the kernels and what runs them
    assert prefetch_kernels(model, parse_options(options)) is None, "what is built already is not guessed again"


def test_a_wrong_guess_costs_time_and_nothing_else(tmp_path: Path) -> None:
    model = _secretly_odd()
    expected = greedy_tokens(model, TOKENS, NUM_TOKENS)
    got = infercomp.LLM(model, codegen="cpp", cache_dir=str(tmp_path), num_blocks=16).generate(
        PROMPT, GREEDY, use_tqdm=False
    )
    assert got[0].outputs[0].token_ids == expected
    assert _libraries(tmp_path) == 3


def test_nothing_is_guessed_where_it_saves_nothing(tmp_path: Path) -> None:
    options = {"cache_dir": str(tmp_path)}
    assert prefetch_kernels(_llama(4), parse_options({"codegen": "cpp", **options})) is None
    assert prefetch_kernels(_llama(), parse_options({"codegen": "reference", **options})) is None
    assert not list(tmp_path.iterdir())


def test_kernels_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INFERCOMP_CODEGEN")
    model = _llama(2)
    llm = infercomp.LLM(model, num_blocks=16)
    assert llm.report.ops["infercomp.linear"] == "cpp"
    torch._dynamo.reset()
    ids = torch.arange(5)[None]
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(model, backend="infercomp")(ids).logits, model(ids).logits)
    assert infercomp.explain(model, ids).ops["infercomp.linear"] == "cpp"
