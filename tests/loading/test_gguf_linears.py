"""Linears that stay in the integers of a GGUF file: the values that gguf restores, from load to a saved model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loading.test_gguf_loader import tiny_model, write_gguf
from loading.test_stored_linears import restored

from infercomp import LLM, ConfigError
from infercomp.codegen.ops.group_codes import packed_codes
from infercomp.loading import gguf_linears
from infercomp.loading.loader import load

TYPES = ["Q8_0", "Q4_0", "Q4_1"]
TOKENS = list(range(3, 40))


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("is_tied", [False, True])
def test_they_stand_for_what_the_file_holds(type_name: str, is_tied: bool, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model(tie_word_embeddings=is_tied), matrix_type=type_name)
    floats = load(path).model.state_dict()
    loaded = load(path, takes_integers=True, widens_gguf=False)
    matrices = {name.removesuffix(".weight") for name, value in floats.items() if value.dim() == 2}
    assert loaded.linears.keys() == matrices - (set() if is_tied else {"model.embed_tokens"})
    for name, linear in loaded.linears.items():
        assert torch.equal(restored(linear), floats[f"{name}.weight"]), name
        assert not loaded.model.get_submodule(name).weight.any()
    assert not load(path, takes_integers=True).linears


@pytest.mark.parametrize("type_name", TYPES)
def test_a_model_is_served_and_saved_in_them(type_name: str, tmp_path: Path) -> None:
    is_tied = type_name == "Q8_0"
    path = write_gguf(tmp_path / "m.gguf", tiny_model(tie_word_embeddings=is_tied), matrix_type=type_name)
    expected = LLM(path, num_blocks=8).logits(TOKENS)
    llm = LLM(path, num_blocks=8, quantization="stored")
    assert llm.report.ops["infercomp.group_weight_linear"]
    assert ("infercomp.group_embedding" in llm.report.ops) == is_tied
    torch.testing.assert_close(llm.logits(TOKENS), expected, rtol=1e-5, atol=1e-5)
    llm.save(tmp_path / "saved")
    assert torch.equal(LLM(tmp_path / "saved", num_blocks=8).logits(TOKENS), llm.logits(TOKENS))
    assert (tmp_path / "saved" / "config.json").exists() == (type_name == "Q4_0")


def test_halves_of_a_byte_in_the_wrong_order_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: codes taken for neighbours that lie 16 apart."""
    path = write_gguf(tmp_path / "m.gguf", tiny_model(), matrix_type="Q4_0")
    expected = load(path).model.lm_head.weight

    def neighbours(codes: torch.Tensor, bits: int) -> torch.Tensor:
        halves = codes.unflatten(-1, (-1, 2, 16))
        return packed_codes(halves.transpose(-1, -2).flatten(1), bits)

    linears = load(path, takes_integers=True, widens_gguf=False).linears
    assert torch.equal(restored(linears["lm_head"]), expected)
    monkeypatch.setattr(gguf_linears, "packed_codes", neighbours)
    assert not torch.equal(restored(linears["lm_head"]), expected)


def test_other_types_stay_floats(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model(), matrix_type="Q5_1")
    assert not load(path, takes_integers=True, widens_gguf=False).linears
    with pytest.raises(ConfigError, match="holds no linear in integers") as caught:
        LLM(path, num_blocks=8, quantization="stored")
    assert caught.value.field == "quantization"


def test_without_a_file_nothing_is_stored() -> None:
    with pytest.raises(ConfigError, match="comes from no file") as caught:
        LLM(tiny_model(), num_blocks=8, quantization="stored")
    assert caught.value.field == "quantization"
