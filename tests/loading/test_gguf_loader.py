"""GGUF: equality with transformers on the real file, round trips of tiny files, and every kind of damage."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from infercomp.demo_model import demo_model_path
from infercomp.loading.gguf_blocks import dequantize
from infercomp.loading.gguf_file import read_gguf_file
from infercomp.loading.loader import LoadedModel, load
from infercomp.runtime.errors import ModelLoadError

TEXTS = [
    "",
    " ",
    "Hello world, how are you?",
    "  two  spaces\n\n\tand tabs \r\n",
    "numbers 1234567890 3.14 1e-5",
    "def f(x):\n    return x  # 日本語 コメント",
    "naïve café Ελληνικά русский العربية हिन्दी",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 and \u200b zero width",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|><repo_name>x<file_sep>",
    "it's we'll I'd THEY'RE don't",
    "\x00\x07\x7f�",
]
MESSAGES = [{"role": "user", "content": "What is 2 + 2? 🙂"}, {"role": "assistant", "content": "4"}]
TINY = LlamaConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    tie_word_embeddings=False,
)
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GLOBAL_NAMES = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load(demo_model_path())


@pytest.fixture(scope="module")
def reference_tokenizer() -> Any:
    # The class that AutoTokenizer settles on, without the seconds it takes to read the config for that.
    path = demo_model_path()
    return PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name)


def tiny_model(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**{**TINY.to_dict(), **changes})
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def gguf_name(name: str) -> str:
    if name in GLOBAL_NAMES:
        return GLOBAL_NAMES[name]
    if name == "lm_head.weight":
        return "output.weight"
    _, _, layer, rest = name.split(".", 3)
    module, _, suffix = rest.rpartition(".")
    return f"blk.{layer}.{LAYER_NAMES[module]}.{suffix}"


def interleave(value: torch.Tensor, num_heads: int) -> torch.Tensor:
    return value.view(num_heads, 2, -1, value.shape[-1]).transpose(1, 2).reshape(value.shape)


def write_gguf(
    path: Path,
    model: Any,
    *,
    architecture: str = "llama",
    matrix_type: str = "F32",
    fields: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    left_out: str = "",
    tokens: list[str] | None = None,
    merges: list[str] | None = None,
    pre: str = "smollm",
) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    numbers = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.dimension_count": config.hidden_size // config.num_attention_heads,
        **(fields or {}),
    }
    for key, value in numbers.items():
        if value is not None:
            (writer.add_string if isinstance(value, str) else writer.add_uint32)(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    if tokens is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL])
        writer.add_token_merges(merges or [])
        writer.add_eos_token_id(len(tokens) - 1)
        writer.add_bos_token_id(len(tokens) - 1)
        writer.add_add_bos_token(True)
    kind = gguf.GGMLQuantizationType[matrix_type]
    stored = dict(model.state_dict())
    for name, value in stored.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if "q_proj" in name and architecture == "llama":
            value = interleave(value, config.num_attention_heads)
        if "k_proj" in name and architecture == "llama":
            value = interleave(value, config.num_key_value_heads)
        if gguf_name(name) != left_out:
            data = value.numpy()
            is_matrix = data.ndim == 2
            data = gguf.quants.quantize(data, kind) if is_matrix else data
            writer.add_tensor(gguf_name(name), data, raw_dtype=kind if is_matrix else None)
    for name, extra in (tensors or {}).items():
        writer.add_tensor(name, extra)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", tiny_model())


def refusal(path: Path) -> ModelLoadError:
    before = sorted(path.parent.iterdir())
    with pytest.raises(ModelLoadError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert caught.value.remedy
    assert sorted(path.parent.iterdir()) == before
    return caught.value


class TestRealFile:
    def test_logits_and_weights_equal_those_of_transformers_bit_for_bit(self, demo: LoadedModel) -> None:
        path = demo_model_path()
        reference = AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.float32
        ).eval()
        own = demo.model.state_dict()
        assert own.keys() == reference.state_dict().keys()
        assert all(torch.equal(own[name], value) for name, value in reference.state_dict().items())
        ids = demo.tokenizer("The capital of France is Paris, and 2 + 2 =", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert torch.equal(demo.model(ids).logits, reference(ids).logits)
        extra = {"_name_or_path", "_model_name_or_path", "quantization_config", "unk_token_id"}
        expected = {key: value for key, value in reference.config.to_dict().items() if key not in extra}
        assert {key: value for key, value in demo.model.config.to_dict().items() if key not in extra} == expected
        assert demo.model.generation_config == reference.generation_config

    def test_model_is_ready_to_run(self, demo: LoadedModel) -> None:
        assert not demo.model.training
        assert not any(parameter.requires_grad for parameter in demo.model.parameters())
        everything = [*demo.model.parameters(), *demo.model.buffers()]
        assert not any(value.is_meta for value in everything)
        assert {parameter.dtype for parameter in demo.model.parameters()} == {torch.float32}
        assert demo.model.lm_head.weight is demo.model.model.embed_tokens.weight
        assert demo.weight_files == (str(demo_model_path()),)

    def test_tokenizer_serialises_as_that_of_transformers(self, demo: LoadedModel, reference_tokenizer: Any) -> None:
        assert demo.tokenizer.backend_tokenizer.to_str() == reference_tokenizer.backend_tokenizer.to_str()
        assert demo.tokenizer.special_tokens_map == reference_tokenizer.special_tokens_map
        assert demo.tokenizer.all_special_ids == reference_tokenizer.all_special_ids

    @pytest.mark.parametrize("text", TEXTS)
    def test_text_encodes_and_decodes_alike(self, demo: LoadedModel, reference_tokenizer: Any, text: str) -> None:
        ids = demo.tokenizer(text)["input_ids"]
        assert ids == reference_tokenizer(text)["input_ids"]
        for skip in (False, True):
            expected = reference_tokenizer.decode(ids, skip_special_tokens=skip)
            assert demo.tokenizer.decode(ids, skip_special_tokens=skip) == expected

    def test_chat_template_renders_alike(self, demo: LoadedModel, reference_tokenizer: Any) -> None:
        for prompt in (False, True):
            arguments = {"add_generation_prompt": prompt, "tokenize": False}
            rendered = demo.tokenizer.apply_chat_template(MESSAGES, **arguments)
            assert rendered == reference_tokenizer.apply_chat_template(MESSAGES, **arguments)


class TestTinyFile:
    @pytest.mark.parametrize("is_tied", [False, True])
    def test_float32_file_gives_the_written_model_back(self, tmp_path: Path, is_tied: bool) -> None:
        model = tiny_model(tie_word_embeddings=is_tied)
        loaded = load(write_gguf(tmp_path / "m.gguf", model))
        assert loaded.tokenizer is None
        ids = torch.arange(20)[None]
        assert torch.equal(loaded.model(ids).logits, model(ids).logits)

    @pytest.mark.parametrize("type_name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
    def test_quantised_file_holds_what_gguf_dequantises(self, tmp_path: Path, type_name: str) -> None:
        model = tiny_model()
        path = write_gguf(tmp_path / "m.gguf", model, matrix_type=type_name)
        kind = gguf.GGMLQuantizationType[type_name]
        loaded = load(path).model
        assert loaded.lm_head.weight.dtype == torch.float32
        for name, value in loaded.state_dict().items():
            expected = model.state_dict()[name]
            if expected.dim() == 2:
                quantised = gguf.quants.quantize(expected.numpy(), kind)
                expected = torch.from_numpy(gguf.quants.dequantize(quantised, kind))
            assert torch.equal(value, expected), name

    @pytest.mark.parametrize(("type_name", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
    def test_half_precision_file_keeps_its_type(self, tmp_path: Path, type_name: str, dtype: torch.dtype) -> None:
        model = tiny_model()
        loaded = load(write_gguf(tmp_path / "m.gguf", model, matrix_type=type_name)).model
        assert all(
            torch.equal(value, model.state_dict()[name].to(dtype)) for name, value in loaded.state_dict().items()
        )

    def test_asked_for_dtype_is_the_float32_values_rounded(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", tiny_model(), matrix_type="Q4_1")
        exact = load(path).model.state_dict()
        for name, value in load(path, dtype=torch.bfloat16).model.state_dict().items():
            assert torch.equal(value, exact[name].bfloat16())

    def test_other_architecture_goes_through_transformers(self, tmp_path: Path) -> None:
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        sizes = {name: getattr(TINY, name) for name in names}
        config = Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config).eval()
        path = write_gguf(tmp_path / "m.gguf", model, architecture="qwen2", fields={"vocab_size": 320})
        loaded = load(path).model
        ids = torch.arange(20)[None]
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        loaded.save_pretrained(tmp_path / "saved")
        assert torch.equal(load(tmp_path / "saved").model(ids).logits, model(ids).logits)

    def test_loaded_model_can_be_saved_and_loaded(self, tmp_path: Path, tiny_file: Path) -> None:
        loaded = load(tiny_file).model
        loaded.save_pretrained(tmp_path)
        ids = torch.arange(20)[None]
        assert torch.equal(load(tmp_path).model(ids).logits, loaded(ids).logits)

    def test_rope_factors_divide_the_frequencies(self, tmp_path: Path, tiny_file: Path) -> None:
        factors = np.linspace(1, 4, 8, dtype=np.float32)
        path = write_gguf(tmp_path / "m.gguf", tiny_model(), tensors={"rope_freqs.weight": factors})
        plain = load(tiny_file).model.model.rotary_emb.inv_freq
        assert torch.equal(load(path).model.model.rotary_emb.inv_freq, plain / torch.from_numpy(factors))

    @pytest.mark.parametrize("pre", ["smollm", "llama-bpe"])
    def test_byte_level_tokenizer_equals_that_of_transformers(self, tmp_path: Path, pre: str) -> None:
        from tokenizers.pre_tokenizers import ByteLevel

        tokens = [*sorted(ByteLevel.alphabet()), "Ġt", "he", "Ġthe", "12", "▁x", "<|endoftext|>"]
        merges = ["Ġ t", "h e", "Ġt he", "1 2"]
        path = write_gguf(tmp_path / "m.gguf", tiny_model(), tokens=tokens, merges=merges, pre=pre)
        own = load(path).tokenizer
        expected = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file="m.gguf")
        assert own.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
        assert [own(text)["input_ids"] for text in TEXTS] == [expected(text)["input_ids"] for text in TEXTS]
        assert own("x")["input_ids"][0] == len(tokens) - 1


class TestDamage:
    def test_bad_magic_names_the_magic(self, tmp_path: Path, tiny_file: Path) -> None:
        path = tmp_path / "m.gguf"
        path.write_bytes(b"GGML" + tiny_file.read_bytes()[4:])
        assert refusal(path).field == "magic"

    def test_big_endian_or_unknown_version_is_refused(self, tmp_path: Path, tiny_file: Path) -> None:
        path = tmp_path / "m.gguf"
        path.write_bytes(b"GGUF" + struct.pack(">I", 3) + tiny_file.read_bytes()[8:])
        assert refusal(path).field == "version"

    @pytest.mark.parametrize("offset", [8, 16])
    @pytest.mark.parametrize("count", [2**64 - 1, 2**40, 10**5])
    def test_lying_counts_allocate_nothing(self, tmp_path: Path, tiny_file: Path, offset: int, count: int) -> None:
        data = bytearray(tiny_file.read_bytes())
        data[offset : offset + 8] = struct.pack("<Q", count)
        path = tmp_path / "m.gguf"
        path.write_bytes(data)
        tracemalloc.start()
        refusal(path)
        peak_num_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_num_bytes < 4 << 20

    def test_lying_string_length_names_the_field(self, tmp_path: Path, tiny_file: Path) -> None:
        data = bytearray(tiny_file.read_bytes())
        start = data.index(b"general.architecture") + len(b"general.architecture") + 4
        data[start : start + 8] = struct.pack("<Q", 2**62)
        path = tmp_path / "m.gguf"
        path.write_bytes(data)
        assert refusal(path).field == "general.architecture"

    def test_lying_tensor_shape_names_the_tensor(self, tmp_path: Path, tiny_file: Path) -> None:
        data = bytearray(tiny_file.read_bytes())
        start = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4
        data[start : start + 8] = struct.pack("<Q", 2**62)
        path = tmp_path / "m.gguf"
        path.write_bytes(data)
        assert refusal(path).field == "token_embd.weight"

    def test_truncated_tensor_data_names_a_tensor(self, tmp_path: Path, tiny_file: Path) -> None:
        last = max(read_gguf_file(tiny_file).tensors.values(), key=lambda tensor: tensor.offset)
        path = tmp_path / "m.gguf"
        path.write_bytes(tiny_file.read_bytes()[: last.offset + last.num_bytes - 1])
        assert refusal(path).field == last.name

    @settings(max_examples=60, deadline=None)
    @given(fraction=st.floats(0, 1, exclude_max=True))
    def test_any_truncation_is_a_load_error(self, tmp_path_factory: Any, tiny_file: Path, fraction: float) -> None:
        data = tiny_file.read_bytes()
        end_of_data = max(tensor.offset + tensor.num_bytes for tensor in read_gguf_file(tiny_file).tensors.values())
        path = tmp_path_factory.mktemp("cut") / "m.gguf"
        path.write_bytes(data[: int(fraction * end_of_data)])
        refusal(path)

    @settings(max_examples=150, deadline=None)
    @given(position=st.integers(0, 2500), value=st.integers(0, 255))
    def test_any_changed_header_byte_loads_or_is_a_load_error(
        self, tmp_path_factory: Any, tiny_file: Path, position: int, value: int
    ) -> None:
        data = bytearray(tiny_file.read_bytes())
        data[position] = value
        path = tmp_path_factory.mktemp("flip") / "m.gguf"
        path.write_bytes(data)
        try:
            load(path)
        except ModelLoadError as error:
            assert str(path) in str(error)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("block_count", 10**9),
            ("block_count", 3),
            ("block_count", None),
            ("embedding_length", 0),
            ("embedding_length", 128),
            ("feed_forward_length", 2**31),
            ("attention.head_count", 5),
            ("attention.head_count_kv", 3),
            ("rope.dimension_count", 2**30),
            ("vocab_size", 7),
            ("rope.scaling.type", "yarn"),
        ],
    )
    def test_metadata_that_contradicts_the_tensors_is_refused(self, tmp_path: Path, field: str, value: Any) -> None:
        refusal(write_gguf(tmp_path / "m.gguf", tiny_model(), fields={field: value}))

    @pytest.mark.parametrize(
        ("name", "field"),
        [
            ("token_embd.weight", "token_embd.weight"),
            ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"),
            ("output_norm.weight", "model.norm.weight"),
        ],
    )
    def test_missing_tensor_is_named(self, tmp_path: Path, name: str, field: str) -> None:
        assert refusal(write_gguf(tmp_path / "m.gguf", tiny_model(), left_out=name)).field == field

    def test_unexpected_tensor_is_named(self, tmp_path: Path) -> None:
        extra = {"blk.0.attn_q.bias": np.zeros(64, dtype=np.float32)}
        assert refusal(write_gguf(tmp_path / "m.gguf", tiny_model(), tensors=extra)).field == "blk.0.attn_q.bias"

    def test_more_tokens_than_embedding_rows_is_a_tokenizer_error(self, tmp_path: Path) -> None:
        tokens = [f"t{index}" for index in range(400)]
        error = refusal(write_gguf(tmp_path / "m.gguf", tiny_model(), tokens=tokens))
        assert error.field == "tokenizer"

    @pytest.mark.parametrize("merge", ["no_space", "a b c", "missing pair"])
    def test_bad_merge_is_a_tokenizer_error(self, tmp_path: Path, merge: str) -> None:
        path = write_gguf(tmp_path / "m.gguf", tiny_model(), tokens=["a", "b", "ab"], merges=[merge])
        assert refusal(path).field == "tokenizer"

    def test_unknown_architecture_is_refused(self, tmp_path: Path, tiny_file: Path) -> None:
        path = tmp_path / "m.gguf"
        path.write_bytes(tiny_file.read_bytes().replace(b"llama", b"lxama"))
        assert refusal(path).field == "general.architecture"

    def test_type_that_cannot_be_dequantised_names_the_tensor(self) -> None:
        with pytest.raises(ModelLoadError) as caught:
            dequantize(np.zeros(32, dtype=np.uint8), "I8", "file, some.weight")
        assert caught.value.field == "some.weight"
