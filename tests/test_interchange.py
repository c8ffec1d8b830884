"""Quantised saved models are read by the tools that their format comes from: compressed-tensors and transformers."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
import transformers
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_llm import byte_model, byte_tokenizer, make_llm

import infercomp
from infercomp import LLM, ConfigError, ModelLoadError, UnsupportedError
from infercomp.artifact import MANIFEST, MODEL_CONFIG, WEIGHTS
from infercomp.codegen.ops import quantize_weight_groups
from infercomp.codegen.ops.group_codes import unpacked_codes
from infercomp.loading.compressed_tensors import (
    PACKED,
    SCALE,
    SHAPE,
    ZERO,
    Bits,
    program_form,
    quantization_config,
    stored_tensors,
)
from infercomp.loading.loader import load
from infercomp.loading.stored_linears import StoredLinear
from infercomp.stored_recipe import require_all_found

TOKENS = list(range(3, 40))
CALIBRATION = torch.randint(0, 256, (600,), generator=torch.Generator().manual_seed(1))


@functools.cache
def quantized(quantization: str) -> LLM:
    return LLM(byte_model(), byte_tokenizer(), num_blocks=8, quantization=quantization)


def saved(folder: Path, quantization: str) -> tuple[LLM, Path]:
    llm = quantized(quantization)
    llm.save(folder)
    return llm, folder


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([TOKENS])).logits[0]


@pytest.mark.parametrize("quantization", ["w8a16", "w4a16-g32-sym"])
def test_transformers_reads_the_same_weights(quantization: str, tmp_path: Path) -> None:
    llm, folder = saved(tmp_path / "model", quantization)
    theirs = logits_of(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    ours = llm.logits(TOKENS)
    assert (theirs - ours).abs().max() <= 2e-5 * ours.abs().max()
    assert (logits_of(byte_model()) - ours).abs().max() > 1e-3 * ours.abs().max(), "nothing was quantised"


def test_transformers_reads_w8a8(tmp_path: Path) -> None:
    """It divides a token by 127.5 where we divide by 127, so activations differ by what rounding costs anyway."""
    llm, folder = saved(tmp_path / "model", "w8a8")
    ours, exact = llm.logits(TOKENS), logits_of(byte_model())
    theirs = logits_of(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert (theirs - ours).square().mean() <= 2 * (exact - ours).square().mean()
    assert (theirs - ours).square().mean() <= 1e-2 * ours.square().mean()


@functools.cache
def static() -> LLM:
    return LLM(byte_model(), byte_tokenizer(), num_blocks=8, quantization="w8a8-static", calibration=CALIBRATION)


def test_transformers_reads_static_scales_and_so_do_we(tmp_path: Path) -> None:
    static().save(tmp_path / "model")
    ours, exact = static().logits(TOKENS), logits_of(byte_model())
    theirs = logits_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32))
    assert (theirs - ours).square().mean() <= 2 * (exact - ours).square().mean()
    assert (theirs - ours).square().mean() <= 1e-2 * ours.square().mean()
    served = LLM(as_checkpoint(tmp_path / "model"), num_blocks=8)
    assert torch.equal(served.logits(TOKENS), ours)


def test_steps_that_differ_for_one_input_are_not_merged_away(tmp_path: Path) -> None:
    static().save(tmp_path / "model")
    path = as_checkpoint(tmp_path / "model") / WEIGHTS
    stored = load_file(path)
    stored["model.layers.0.self_attn.k_proj.input_scale"] *= 2
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="steps of their own") as caught:
        LLM(tmp_path / "model", num_blocks=8)
    assert caught.value.field == "input_scale"
    apart = LLM(tmp_path / "model", num_blocks=8, disable="merge_linears").logits(TOKENS)
    assert 0 < (apart - static().logits(TOKENS)).norm() < 0.2 * apart.norm()


@settings(max_examples=40, deadline=None)
# Their reader fails on zeros that fill a single row of words.
@given(st.integers(11, 40), st.integers(1, 3), st.sampled_from([3, 4, 8]), st.booleans(), st.integers(0, 1 << 31))
def test_their_reader_decodes_our_codes(
    num_outputs: int, num_groups: int, bits: int, is_symmetric: bool, seed: int
) -> None:
    """Zeros too, which transformers 5 cannot load: it expects them unpacked."""
    weight = torch.randn(num_outputs, 32 * num_groups, generator=torch.Generator().manual_seed(seed))
    codes, scale, zero = quantize_weight_groups.definition(weight, bits, 32, is_symmetric)
    weights = {f"x{PACKED}": codes, f"x{SCALE}": scale} | ({} if is_symmetric else {f"x{ZERO}": zero})
    stored = stored_tensors(weights, lambda layer: Bits(bits, 16))
    config = QuantizationConfig.model_validate(quantization_config(weights, lambda layer: Bits(bits, 16)))
    (scheme,) = config.config_groups.values()
    assert isinstance(scheme, QuantizationScheme) and scheme.targets == ["x"]
    given_ = {name.removeprefix("x."): tensor for name, tensor in stored.items()}
    theirs = PackedQuantizationCompressor.decompress(given_, scheme)["weight"]
    steps = unpacked_codes(codes, bits).view(num_outputs, num_groups, 32).float()
    middle = 2.0 ** (bits - 1) if is_symmetric else zero[..., None].float()
    assert torch.equal(theirs.float(), ((steps - middle) * scale[..., None].float()).half().float().flatten(1))
    assert stored[f"x{SHAPE}"].tolist() == list(weight.shape)
    for name, tensor in weights.items():
        assert torch.equal(program_form(name, stored[name], tuple(tensor.shape), tensor.dtype, bits), tensor)


def test_an_embedding_in_integers_is_no_checkpoint(tmp_path: Path) -> None:
    """Other tools know quantised linears only: the folder is ours alone, and says so by having no config.json."""
    model = byte_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    LLM(model, byte_tokenizer(), num_blocks=8, quantization="w8a8").save(tmp_path / "tied")
    assert not (tmp_path / "tied" / MODEL_CONFIG).exists()
    LLM(model, num_blocks=8, quantization="w8a8", quantize_lm_head=False).save(tmp_path / "head")
    assert "quantization_config" in json.loads((tmp_path / "head" / MODEL_CONFIG).read_text())


def test_a_model_of_floats_says_nothing_of_quantisation(tmp_path: Path) -> None:
    make_llm().save(tmp_path / "model")
    assert "quantization_config" not in json.loads((tmp_path / "model" / MODEL_CONFIG).read_text())


def test_each_linear_is_stored_under_its_own_name(tmp_path: Path) -> None:
    _, folder = saved(tmp_path / "model", "w8a8")
    stored = load_file(folder / WEIGHTS)
    for name, parameter in byte_model().state_dict().items():
        if name.endswith("proj.weight"):
            assert stored[name].dtype == torch.int8 and stored[name].shape == parameter.shape
            restored = stored[name] * stored[f"{name}_scale"]
            assert (restored - parameter).abs().max() <= 0.5001 * stored[f"{name}_scale"].max()
    assert json.loads((folder / MANIFEST).read_text())["passes"]["quantization"] == "w8a8"


def as_checkpoint(folder: Path) -> Path:
    """The saved model as any other tool would have written it: without our manifest."""
    (folder / MANIFEST).unlink()
    return folder


@pytest.mark.parametrize("quantization", ["w8a16", "w4a8-g32"])
def test_a_checkpoint_in_integers_is_served_on_them(quantization: str, tmp_path: Path) -> None:
    llm, folder = saved(tmp_path / "model", quantization)
    served = LLM(as_checkpoint(folder), num_blocks=8)
    assert torch.equal(served.logits(TOKENS), llm.logits(TOKENS))
    again = served.save(tmp_path / "again") or tmp_path / "again"
    assert torch.equal(LLM(again, num_blocks=8).logits(TOKENS), llm.logits(TOKENS))
    mine, theirs = load_file(folder / WEIGHTS), load_file(again / WEIGHTS)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_kernels_run_on_the_stored_integers(tmp_path: Path) -> None:
    llm, folder = saved(tmp_path / "model", "w4a16-g32-sym")
    served = LLM(as_checkpoint(folder), num_blocks=8, codegen="cpp")
    torch.testing.assert_close(served.logits(TOKENS), llm.logits(TOKENS), rtol=1e-4, atol=1e-4)
    assert served.report.ops["infercomp.group_weight_linear"] == "cpp"


def test_layers_that_stay_floats_stay_floats(tmp_path: Path) -> None:
    recipe = infercomp.LayerRecipes((("layers.0.mlp.*", infercomp.W8A8()), ("down_proj", infercomp.W4A16())))
    llm = LLM(byte_model(), byte_tokenizer(), num_blocks=8, quantization=recipe)
    llm.save(tmp_path / "model")
    served = LLM(as_checkpoint(tmp_path / "model"), num_blocks=8)
    assert torch.equal(served.logits(TOKENS), llm.logits(TOKENS))


@pytest.mark.parametrize(
    ("field", "options"), [("quantization", {"quantization": "w8a8"}), ("verify", {"verify": True})]
)
def test_options_that_need_floats_are_refused(field: str, options: dict, tmp_path: Path) -> None:
    _, folder = saved(tmp_path / "model", "w8a8")
    with pytest.raises(ConfigError) as caught:
        LLM(as_checkpoint(folder), **options)
    assert caught.value.field == field and caught.value.remedy


def test_a_linear_that_is_not_taken_is_an_error(tmp_path: Path) -> None:
    """Its floats are zeros: nothing may be computed with them."""
    _, folder = saved(tmp_path / "model", "w8a8")
    with pytest.raises(UnsupportedError, match="down_proj"):
        LLM(as_checkpoint(folder), disable="quantize_linears#3")


def test_whoever_wants_floats_is_told(tmp_path: Path) -> None:
    _, folder = saved(tmp_path / "model", "w8a8")
    with pytest.raises(ModelLoadError) as caught:
        load(as_checkpoint(folder))
    assert caught.value.field == "quantization_config"


def test_a_smoothed_model_is_served_as_before(tmp_path: Path) -> None:
    """Scales are folded into what is saved; what other tools read is the same function of the same tensors."""
    tokens = [torch.arange(3, 203) % 250]
    llm = LLM(byte_model(), byte_tokenizer(), num_blocks=8, quantization="w8a8-smoothquant", calibration=tokens)
    llm.save(tmp_path / "model")
    assert torch.equal(LLM(tmp_path / "model", num_blocks=8).logits(TOKENS), llm.logits(TOKENS))
    assert torch.equal(LLM(as_checkpoint(tmp_path / "model"), num_blocks=8).logits(TOKENS), llm.logits(TOKENS))


def test_a_linear_of_another_name_is_an_error() -> None:
    """What transformers renames while it loads would be left as zeros."""
    linear = StoredLinear(8, 8, None, True, (4, 4), lambda: ())
    require_all_found({"layers.0.q": linear}, {"layers.0.q.weight", "norm.weight"})
    with pytest.raises(UnsupportedError, match=r"layers\.0\.q") as caught:
        require_all_found({"layers.0.q": linear}, {"model.layers.0.q.weight"})
    assert caught.value.field == "quantization_config" and caught.value.remedy
