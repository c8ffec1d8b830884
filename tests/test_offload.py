"""A model whose weights wait on disk while it is compiled is the one that is compiled in memory, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import infercomp
from infercomp.runtime.errors import ConfigError, FallbackWarning

TOKENS = torch.randint(0, 100, (4, 64), generator=torch.Generator().manual_seed(1))
# Matrices of 64 KiB and more are moved to disk.
CONFIG = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 200, "max_position_embeddings": 96, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**CONFIG, tie_word_embeddings=True)
    path = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def logits(folder: Path, **options: Any) -> torch.Tensor:
    return infercomp.LLM(folder, num_blocks=16, **options).logits(TOKENS[0].tolist())


@pytest.mark.parametrize(
    "options",
    [
        {"quantization": "w4a16-g32-gptq"},
        {"quantization": "w8a16-search", "dtype": torch.bfloat16},
        {"quantization": "w8a8-smoothquant"},
        {"quantization": "w8a8-static-smoothquant", "sparsity": infercomp.NM(2, 4, score="wanda")},
        {"sparsity": infercomp.NM(2, 4, score="sparsegpt", permute="greedy")},
        {"kv_heads": infercomp.GroupedQuery(1, merge="aligned")},
    ],
    ids=lambda options: "-".join(options),
)
def test_bits_are_those_of_memory(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    in_memory = logits(folder, calibration=TOKENS, offload_folder=None, **options)
    on_disk = logits(folder, calibration=TOKENS, offload_folder=str(tmp_path / "made"), **options)
    assert torch.equal(on_disk, in_memory)
    assert list((tmp_path / "made").iterdir()) == []


def test_a_folder_that_is_asked_for_is_used_without_calibration(folder: Path, tmp_path: Path) -> None:
    assert torch.equal(
        logits(folder, quantization="w8a16", offload_folder=str(tmp_path / "made")),
        logits(folder, quantization="w8a16"),
    )
    assert (tmp_path / "made").exists()


def test_calibration_alone_puts_weights_beside_the_kernels(folder: Path, tmp_path: Path) -> None:
    logits(folder, quantization="w8a16", cache_dir=str(tmp_path / "plain"))
    assert not (tmp_path / "plain").exists()
    logits(folder, quantization="w8a16-search", calibration=TOKENS, cache_dir=str(tmp_path / "calibrated"))
    assert list((tmp_path / "calibrated").iterdir()) == []


def test_without_a_folder_for_kernels_weights_stay_in_memory(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(FallbackWarning, match="weights stay in memory"):
        logits(folder, quantization="w8a16-search", calibration=TOKENS, cache_dir=str(tmp_path / "file"))


def test_a_folder_that_cannot_be_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as caught:
        logits(folder, offload_folder=str(tmp_path / "file"))
    assert caught.value.field == "offload_folder"
