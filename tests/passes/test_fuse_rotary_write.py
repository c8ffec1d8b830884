"""fuse_rotary_write: keys are rotated in the kernel that writes them into the cache."""

from __future__ import annotations

import torch
from fusions import kernels
from transformers import LlamaConfig, LlamaForCausalLM

from infercomp.codegen.ops import rotary_embedding, write_kv
from infercomp.passes.config import PassConfig
from infercomp.passes.pipeline import run_pipeline
from infercomp.serving import capture_for_serving


def _graph(*disable: str):  # type: ignore[no-untyped-def]
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=40, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model_graph, examples = capture_for_serving(LlamaForCausalLM(config).eval(), 64)
    records = run_pipeline(model_graph, PassConfig(disable=disable, verify=True), serving=True, example_inputs=examples)
    return model_graph, {record.name: record for record in records}


def test_fires_in_every_layer() -> None:
    model_graph, records = _graph()
    assert kernels(model_graph).count(["rotary_embedding", "write_kv"]) == 2
    assert (records["fuse_rotary_write"].matches, records["fuse_rotary_write"].max_error) == (2, 0.0)
    # Queries are rotated by kernels of their own.
    alone = [node for node in model_graph.calls(rotary_embedding.overload) if "kernel" not in node.meta]
    assert len(alone) == 2


def test_one_layer_switched_off() -> None:
    model_graph, records = _graph("fuse_rotary_write#0")
    assert records["fuse_rotary_write"].skipped == 1
    assert ["kernel" in node.meta for node in model_graph.calls(write_kv.overload)] == [False, True]
