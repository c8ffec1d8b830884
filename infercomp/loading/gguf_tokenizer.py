"""The tokenizer a GGUF file describes, built from metadata that is already read, as transformers would build it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from infercomp.loading.gguf_file import GgufFile
from infercomp.runtime.errors import ModelLoadError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CONTROL, _USER_DEFINED = 3, 4
_NAMED_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
_SETTINGS = {
    "chat_template": "tokenizer.chat_template",
    "add_bos_token": "tokenizer.ggml.add_bos_token",
    "add_eos_token": "tokenizer.ggml.add_eos_token",
}
# How text is cut before merging, by tokenizer.ggml.pre; None is the cut of GPT-2.
_LLAMA_3_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS: dict[str | None, str | None] = {
    None: None,
    "default": None,
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _LLAMA_3_CUT,
    "llama3": _LLAMA_3_CUT,
}


def build_gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast | None:
    """The file's tokenizer, or None where the file carries none."""
    metadata = file.metadata
    if "tokenizer.ggml.model" not in metadata:
        return None
    try:
        if _is_byte_level(metadata):
            return _byte_level_tokenizer(file)
        return _tokenizer_of_transformers(file)
    except ModelLoadError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception for inconsistent vocabularies
        raise ModelLoadError(
            f"The file's tokenizer cannot be built: {error}",
            where=f"{file.path}, tokenizer.ggml.*",
            remedy="convert the model to GGUF again, or load its safetensors folder",
            field="tokenizer",
        ) from error


def _is_byte_level(metadata: dict[str, Any]) -> bool:
    known_cut = metadata.get("tokenizer.ggml.pre") in _CUTS
    return metadata["tokenizer.ggml.model"] == "gpt2" and "tokenizer.ggml.merges" in metadata and known_cut


def _tokenizer_of_transformers(file: GgufFile) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(file.path.parent), gguf_file=file.path.name, local_files_only=True)


def _byte_level_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    metadata = file.metadata
    tokens = _list(file, "tokenizer.ggml.tokens")
    merges = [_merge(file, line) for line in _list(file, "tokenizer.ggml.merges")]
    vocabulary = _spelled_in_bytes(tokens)
    bpe = models.BPE(vocab=vocabulary, merges=merges, continuing_subword_prefix="", end_of_word_suffix="")
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = _pre_tokenizer(_CUTS[metadata.get("tokenizer.ggml.pre")])
    tokenizer.decoder = decoders.ByteLevel()
    _add_whole_tokens(tokenizer, tokens, metadata.get("tokenizer.ggml.token_type", []))
    named_tokens = {name: _token(file, tokens, key) for name, key in _NAMED_TOKENS.items()}
    settings = {name: metadata[key] for name, key in _SETTINGS.items() if key in metadata}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, name_or_path=str(file.path), **named_tokens, **settings)


def _pre_tokenizer(cut: str | None) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if cut is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(cut), behavior="isolated"), to_bytes])


def _spelled_in_bytes(tokens: list[str]) -> dict[str, int]:
    """Token -> id, each token in the alphabet of ByteLevel, in which one letter stands for one byte."""
    from tokenizers import pre_tokenizers

    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def spell(token: str) -> str:
        if alphabet.issuperset(token):
            return token
        return "".join(piece for piece, _ in to_bytes.pre_tokenize_str(token))

    return {spell(token): index for index, token in enumerate(tokens)}


def _add_whole_tokens(tokenizer: Any, tokens: list[str], token_types: list[int]) -> None:
    """Control and user-defined tokens are matched whole; one not spelled in bytes is mislabelled and left alone."""
    from tokenizers import AddedToken, pre_tokenizers

    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    typed_tokens = list(zip(tokens, token_types, strict=False))
    control = [token for token, kind in typed_tokens if kind == _CONTROL and alphabet.issuperset(token)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    user_defined = [token for token, kind in typed_tokens if kind == _USER_DEFINED]
    known = [token for token in user_defined if tokenizer.token_to_id(token) is not None]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in known])


def _list(file: GgufFile, key: str) -> list[str]:
    values = file.metadata.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise _error(file, "The metadata field is not a list of strings.", key)
    return values


def _merge(file: GgufFile, line: str) -> tuple[str, str]:
    left, separator, right = line.partition(" ")
    if not separator or " " in right:
        raise _error(file, f"The merge {line!r} is not two tokens with a space between.", "tokenizer.ggml.merges")
    return left, right


def _token(file: GgufFile, tokens: list[str], key: str) -> str | None:
    token_id = file.metadata.get(key)
    if token_id is None:
        return None
    if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
        raise _error(file, f"The token id {token_id} is not one of the {len(tokens)} tokens.", key)
    return tokens[token_id]


def _error(file: GgufFile, what: str, key: str) -> ModelLoadError:
    remedy = "convert the model to GGUF again, or load its safetensors folder"
    return ModelLoadError(what, where=f"{file.path}, {key}", remedy=remedy, field="tokenizer")
