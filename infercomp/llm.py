"""``LLM``: a model, captured once, served by a paged engine. Names follow vLLM's."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .artifact import is_artifact, load_artifact, save_artifact
from .config import Config, parse_options
from .loading.loader import check_vocabulary, load, load_saved_tokenizer
from .loading.stored_linears import StoredLinear
from .loading.weight_bytes import as_it_is
from .progress import request_progress
from .report import Report
from .runtime.decode_graphs import CudaCapture
from .runtime.disk_memory import DiskMemory
from .runtime.engine import Engine, StepModel
from .runtime.errors import ConfigError, FallbackWarning, InputError, ModelLoadError
from .runtime.kv_pools import allocate_pools, num_blocks_for
from .runtime.request import RequestOutput, SamplingParams, checked_prompt
from .runtime.step import StepInputs
from .served_model import ServedForm, ServedModel
from .texts import Texts

Prompt = str | Mapping[str, Any]
_Encoded = tuple[str | None, Sequence[int]]
_DEFAULT_MAX_MODEL_LEN = 2048


class LLM:
    """Generates from a causal language model with a KV cache that the compiler inserted.

    ``model`` is a folder (of a checkpoint, or what ``save`` wrote), a ``.gguf`` file, a hub id, or a module
    whose forward takes ``input_ids`` and returns logits [1, tokens, vocabulary]; it is put in eval mode, and
    merged weights stay shared with it. ``tokenizer`` is a Hugging Face tokenizer; without one, prompts are
    token ids. ``calibration`` is text for recipes that need some (``calibration_samples.calibration_for``), and
    ``evaluation`` text on which the error of each quantised layer is measured for ``report.layer_errors``.
    In ``calibration_folder`` stays what calibration has found, layer by layer: a run that was cut off goes on there.
    ``options`` are those of ``infercomp.config.parse_options`` (``num_blocks``, ``max_num_seqs``, ``disable``,
    ``dump`` …); of a saved model, those that compiling depends on are fixed.

    Raises ModelLoadError for a bad source, CaptureError and ProofError for a model that cannot be
    served with a cache, ConfigError for a bad option.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | torch.nn.Module,
        tokenizer: Any = None,
        *,
        dtype: torch.dtype | None = None,
        calibration: Any = None,
        calibration_folder: str | os.PathLike[str] | None = None,
        evaluation: Any = None,
        **options: Any,
    ) -> None:
        config = parse_options(options)
        texts = Texts(calibration, calibration_folder, evaluation)
        if is_artifact(model):
            _require_only_options(dtype, texts)
            form, weights = load_artifact(model, config)  # type: ignore[arg-type]
            tokenizer = tokenizer or load_saved_tokenizer(Path(model).expanduser())  # type: ignore[arg-type]
        else:
            form, weights, tokenizer = _compiled(model, tokenizer, dtype, config, texts)
            # Weights are packed one after the other, and what nobody else holds goes as it is packed. Capturing
            # leaves cycles behind that hold the module.
            del model
            gc.collect()
        self.config: Config = form.config
        self.tokenizer = tokenizer
        self.max_model_len = _max_model_len(form.position_limit, form.config)
        self.eos_token_ids = form.eos_token_ids
        self.report: Report = form.report
        self._served = ServedModel(form, weights)
        runtime = self.config.runtime
        self.num_blocks = num_blocks_for(form.cache_specs, runtime)
        self._engine = Engine(
            self._step_function(),
            runtime,
            num_blocks=self.num_blocks,
            max_model_len=self.max_model_len,
            eos_token_ids=self.eos_token_ids,
            tokenizer=tokenizer,
            vocab_size=form.vocab_size,
        )
        self._num_requests = 0
        self._outputs: dict[str, RequestOutput] = {}

    def _step_function(self) -> StepModel:
        """The step over this model's caches; one that replays graphs has a spare block for what it pads."""
        runtime, served = self.config.runtime, self._served
        has_graphs = runtime.decode_graphs and served.runs_as_graph
        pools = allocate_pools(
            served.form.cache_specs, self.num_blocks + int(has_graphs), runtime.block_size, served.device
        )
        if not has_graphs:
            return served.with_pools(pools)
        return served.with_graphs(pools, self.num_blocks, runtime, CudaCapture())

    @property
    def stats(self) -> Any:
        """Counters of the engine: steps, tokens, preemptions, peak blocks."""
        return self._engine.stats

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the compiled model into ``folder``; ``LLM(folder)`` serves it with no tracing and no passes.

        The folder holds the weights in safetensors, the tokenizer, and the program as data. It is made whole
        or not at all; one that holds a saved model is replaced. Raises ConfigError for a folder that holds
        something else or cannot be written, UnsupportedError for a program that cannot be saved.
        """
        save_artifact(self._served, self.tokenizer, Path(folder).expanduser())

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete the prompts, all at once under the token budget; outputs come in the order of the prompts.

        A prompt is a string or ``{"prompt_token_ids": [...]}``. ``use_tqdm`` shows a progress bar on a
        terminal. A prompt that cannot be served raises before anything runs; if interrupted, every
        request is dropped. A request whose logits are not numbers ends alone, with ``error`` set.
        """
        batch = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
        params = _params_per_prompt(sampling_params, len(batch))
        ids = self._add_all(batch, params)
        waiting = set(ids)
        try:
            with request_progress(len(ids), use_tqdm) as advance:
                while waiting:
                    for request_id in self._step() & waiting:
                        waiting.discard(request_id)
                        advance()
        except BaseException:
            self._engine.abort_all()
            self._outputs.clear()
            raise
        return [self._outputs.pop(request_id) for request_id in ids]

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[str]:
        """Yield the completion's text in pieces as it is generated; closing the iterator drops the request."""
        if self.tokenizer is None:
            raise InputError("streaming yields text, which needs a tokenizer", field="tokenizer", remedy="use generate")
        params = sampling_params or SamplingParams()
        if params.n != 1:
            raise InputError("a stream has one completion", field="n", remedy="use n=1, or generate")
        text, tokens = self._encoded(prompt)
        self._engine.check_request(tokens, params)
        return self._pieces((text, tokens), params)

    def _pieces(self, encoded: _Encoded, params: SamplingParams) -> Iterator[str]:
        """The request is queued when the first piece is asked for: an iterator that nobody starts holds nothing."""
        request_id = self._add(encoded, params)
        num_shown = 0
        try:
            while True:
                output = self._outputs.get(request_id)
                text = output.outputs[0].text if output else ""
                if len(text) > num_shown:
                    yield text[num_shown:]
                    num_shown = len(text)
                elif (output is not None and output.finished) or not self._engine.has_unfinished_requests():
                    break
                else:
                    self._step()
            if output is not None and output.outputs[0].error is not None:
                raise output.outputs[0].error
        finally:
            self._engine.abort_request(request_id)
            self._outputs.pop(request_id, None)

    def _step(self) -> set[str]:
        """One step of the engine for whoever asks first; returns the requests that ended with it."""
        outputs = self._engine.step()
        self._outputs.update({output.request_id: output for output in outputs})
        return {output.request_id for output in outputs if output.finished}

    def chat(
        self, messages: Sequence[Mapping[str, str]], sampling_params: SamplingParams | None = None
    ) -> RequestOutput:
        """Answer a conversation (``[{"role": "user", "content": …}]``) through the tokenizer's chat template."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise InputError(
                "the tokenizer has no chat template", field="messages", remedy="use generate with a prompt"
            )
        encoded = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
        return self.generate({"prompt_token_ids": list(encoded["input_ids"])}, sampling_params)[0]

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Teacher-forced logits [tokens, vocabulary] of one sequence, computed through a cache of its own."""
        tokens = checked_prompt(token_ids, self.max_model_len + 1, self._served.form.vocab_size)
        runtime = self.config.runtime
        num_blocks = -(-len(tokens) // runtime.block_size)
        pools = allocate_pools(self._served.form.cache_specs, num_blocks, runtime.block_size, self._served.device)
        model = self._served.with_pools(pools)
        chunk = runtime.max_num_batched_tokens
        rows = [
            model(_whole_rows(tokens, start, min(start + chunk, len(tokens)), num_blocks))
            for start in range(0, len(tokens), chunk)
        ]
        # A copy of all logits is as large as a small model.
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _add_all(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> list[str]:
        """Queue every prompt, or none: the first that cannot be served drops those before it."""
        encoded = [self._encoded(prompt) for prompt in prompts]
        ids: list[str] = []
        try:
            for one, its_params in zip(encoded, params, strict=True):
                ids.append(self._add(one, its_params))
        except BaseException:
            for request_id in ids:
                self._engine.abort_request(request_id)
            raise
        return ids

    def _add(self, encoded: _Encoded, params: SamplingParams) -> str:
        text, tokens = encoded
        request_id = str(self._num_requests)
        self._engine.add_request(request_id, tokens, params, text)
        self._num_requests += 1
        return request_id

    def _encoded(self, prompt: Prompt) -> _Encoded:
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" not in prompt:
                raise InputError(
                    f"a prompt given as a mapping needs 'prompt_token_ids', got {sorted(map(str, prompt))}",
                    field="prompt",
                    remedy='pass {"prompt_token_ids": [...]} or a string',
                )
            return prompt.get("prompt"), prompt["prompt_token_ids"]
        if not isinstance(prompt, str):
            raise InputError(
                f"a prompt is a string or a mapping, got {type(prompt).__name__}",
                field="prompt",
                remedy='pass a string or {"prompt_token_ids": [...]}',
            )
        if self.tokenizer is None:
            raise InputError(
                "a text prompt needs a tokenizer",
                field="prompt",
                remedy='pass LLM(model, tokenizer), or {"prompt_token_ids": [...]}',
            )
        if not prompt:
            raise InputError("the prompt is empty", field="prompt", remedy="pass at least one character")
        return prompt, self.tokenizer(prompt)["input_ids"]


def _whole_rows(tokens: list[int], start: int, end: int, num_blocks: int) -> StepInputs:
    """A step over tokens start…end of one sequence whose blocks are 0, 1, 2 …, with logits for every row."""
    positions = torch.arange(start, end)
    return StepInputs(
        input_ids=torch.tensor(tokens[start:end]),
        positions=positions,
        slot_mapping=positions,
        block_tables=torch.arange(num_blocks)[None],
        seq_lens=torch.tensor([end]),
        query_start_loc=torch.tensor([0, end - start]),
        logits_indices=torch.arange(end - start),
    )


def _params_per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> Sequence[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    if len(params) != num_prompts:
        raise InputError(
            f"{len(params)} sampling_params for {num_prompts} prompts",
            field="sampling_params",
            remedy="pass one for all, or one for each",
        )
    return params


def _compiled(
    model: str | os.PathLike[str] | torch.nn.Module,
    tokenizer: Any,
    dtype: torch.dtype | None,
    config: Config,
    texts: Texts,
) -> tuple[ServedForm, MutableMapping[str, torch.Tensor], Any]:
    """The model compiled: its served form, its weights and its tokenizer."""
    # A saved model needs none of the compiler.
    from .kernel_prefetch import prefetch_kernels
    from .passes.config import check_pass_names
    from .passes.pipeline import pass_names
    from .passes.recipes import Stored
    from .serving import compile_for_serving, position_limit
    from .stored_recipe import with_stored_recipe

    check_pass_names(config.passes, pass_names())
    linears: Mapping[str, StoredLinear] = {}
    disk: DiskMemory | None = None
    if isinstance(model, torch.nn.Module):
        module = model if dtype is None else model.to(dtype)
        check_vocabulary(module, tokenizer, type(module).__name__)
    else:
        widens = not isinstance(config.passes.recipe, Stored)
        disk = _disk_for(config, texts)
        place = as_it_is if disk is None else disk.held
        loaded = load(model, dtype=dtype, takes_integers=True, widens_gguf=widens, place=place)
        module, tokenizer, linears = loaded.model, tokenizer or loaded.tokenizer, loaded.linears
        config = with_stored_recipe(config, linears, module)
    _max_model_len(position_limit(module), config)
    prefetch_kernels(module.eval(), config)
    if linears and texts.evaluation is not None:
        what = "weights that come in integers have no floats to measure errors of layers against"
        raise ConfigError(what, field="evaluation", remedy="leave it out, or load the unquantised checkpoint")
    is_ours = not isinstance(model, torch.nn.Module)
    compiled = compile_for_serving(module, tokenizer, config, linears, texts, releases_model=is_ours, disk=disk)
    return *compiled, tokenizer


def _disk_for(config: Config, texts: Texts) -> DiskMemory | None:
    """Where the weights of a model that we load wait while it is compiled; unasked, only where it is calibrated, which
    takes long and reads one layer after the other."""
    from .codegen.cpp.toolchain import cache_folder

    if config.offload_folder is None or (config.offload_folder == "auto" and texts.calibration is None):
        return None
    if config.offload_folder != "auto":
        return DiskMemory(Path(config.offload_folder).expanduser())
    try:
        return DiskMemory(cache_folder(config.codegen.cache_dir))
    except ConfigError as error:
        warnings.warn(f"weights stay in memory: {error.what}", FallbackWarning, stacklevel=4)
        return None


def _require_only_options(dtype: torch.dtype | None, texts: Texts) -> None:
    """A saved model is what it is."""
    if dtype is not None:
        remedy = "leave it out, or load the original model with this dtype"
        raise ConfigError("a saved model has the dtype that it was saved with", field="dtype", remedy=remedy)
    for name in texts.given():
        remedy = "leave it out, or load the original model with it"
        raise ConfigError(f"a saved model needs no {name}", field=name, remedy=remedy)


def _max_model_len(limit: int | None, config: Config) -> int:
    """What is wanted, within the positions of the model."""
    wanted = config.runtime.max_model_len
    if wanted is not None and limit is not None and wanted > limit:
        raise ModelLoadError(
            f"max_model_len={wanted} is beyond the model's {limit} positions",
            field="max_model_len",
            remedy=f"use at most {limit}",
        )
    return wanted or limit or _DEFAULT_MAX_MODEL_LEN
