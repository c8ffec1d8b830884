"""SmolLM2 quantised by other tools, measured as benchmarks/quantization.py measures our recipes.

The same float32 model, the same calibration and evaluation text, the same divergence; all linears but the LM head. Only
quality: speeds are compared by ``infercomp bench --vs``. A tool that is not installed here is left out, and said so.

    python benchmarks/quantization_tools.py --output benchmarks/results/quantization_tools.json
    python benchmarks/quantization_tools.py --only llama.cpp
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from quantization import EVALUATION_TOKENS, halves, run_facts

from infercomp.demo_model import demo_model_path
from infercomp.loading.gguf_file import read_gguf_file
from infercomp.loading.gguf_tokenizer import build_gguf_tokenizer
from infercomp.loading.loader import load
from infercomp.quality import Logits, measure_quality

RESULTS = Path(__file__).parent / "results" / "quantization_tools.json"
WINDOW = 512
Windows = Sequence[Sequence[int]]


def is_body(module: torch.nn.Module, name: str) -> bool:
    return isinstance(module, torch.nn.Linear) and "lm_head" not in name


def torchao(model: Any, windows: Windows, config: Any) -> None:
    from torchao.quantization import quantize_

    quantize_(model, config, filter_fn=is_body)


def torchao_int8(model: Any, windows: Windows) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    torchao(model, windows, Int8WeightOnlyConfig())


def torchao_int8_dynamic(model: Any, windows: Windows) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    torchao(model, windows, Int8DynamicActivationInt8WeightConfig())


def torchao_int4(model: Any, windows: Windows) -> None:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    torchao(model, windows, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64)))


def bitsandbytes_int8(model: Any, windows: Windows) -> None:
    """LLM.int8() with its threshold of 6."""
    import bitsandbytes

    for name, module in list(model.named_modules()):
        if is_body(module, name):
            layer = bitsandbytes.nn.Linear8bitLt(
                module.in_features, module.out_features, bias=False, has_fp16_weights=False, threshold=6.0
            )
            layer.weight = bitsandbytes.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
            model.set_submodule(name, layer.to("cpu"))


def llmcompressor_gptq(model: Any, windows: Windows) -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = QuantizationArgs(num_bits=4, group_size=64, symmetric=True, strategy="group", actorder="static")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compress(model, windows, [GPTQModifier(config_groups={"linears": scheme}, ignore=["lm_head"])])


def llmcompressor_smoothquant(model: Any, windows: Windows) -> None:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.smoothquant import SmoothQuantModifier

    recipe = [
        SmoothQuantModifier(smoothing_strength=0.5),
        GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
    ]
    compress(model, windows, recipe)


def compress(model: Any, windows: Windows, recipe: list[Any]) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot

    rows = {"input_ids": list(windows), "attention_mask": [[1] * len(each) for each in windows]}
    # It reads the config of the folder that a model comes from again, and insists on a tokenizer.
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        model.name_or_path = model.config._name_or_path = folder
        oneshot(
            model=model,
            processor=build_gguf_tokenizer(read_gguf_file(demo_model_path())),
            dataset=Dataset.from_dict(rows),
            recipe=recipe,
            max_seq_length=WINDOW,
            num_calibration_samples=len(windows),
        )


Quantize = Callable[[Any, Windows], None]
MODULE_TOOLS: dict[str, tuple[str, float, Quantize]] = {
    "torchao int8 weights": ("torchao", 8, torchao_int8),
    "torchao int8 weights and activations": ("torchao", 8, torchao_int8_dynamic),
    "torchao int4 weights, groups of 64": ("torchao", 4.25, torchao_int4),
    "bitsandbytes LLM.int8()": ("bitsandbytes", 8, bitsandbytes_int8),
    "llmcompressor SmoothQuant + GPTQ, W8A8": ("llmcompressor", 8, llmcompressor_smoothquant),
    "llmcompressor GPTQ, 4 bits, groups of 64": ("llmcompressor", 4.25, llmcompressor_gptq),
}
LLAMA_TYPES = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}
"""Numbers of llama.cpp's ``llama_ftype``."""


@contextmanager
def module_logits(quantize: Quantize, windows: Windows) -> Iterator[Logits]:
    model = load(demo_model_path(), dtype=torch.float32).model
    quantize(model, windows)

    def logits(tokens: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=torch.tensor([tokens])).logits[0].float()

    yield logits


def llama_file(kind: str, folder: Path) -> Path:
    """The demo model with its linears in one of llama.cpp's types, and the embedding as it is in float32."""
    import ctypes

    import llama_cpp

    path = folder / f"{kind}.gguf"
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.allow_requantize, parameters.nthread = LLAMA_TYPES[kind], True, 2
    parameters.token_embedding_type = parameters.output_tensor_type = 0
    failed = llama_cpp.llama_model_quantize(
        str(demo_model_path()).encode(), str(path).encode(), ctypes.byref(parameters)
    )
    assert not failed, f"llama.cpp cannot write {kind}"
    return path


@contextmanager
def llama_logits(path: Path) -> Iterator[Logits]:
    import llama_cpp

    llama = llama_cpp.Llama(str(path), n_ctx=WINDOW, n_batch=WINDOW, logits_all=True, n_threads=2, verbose=False)

    def logits(tokens: Sequence[int]) -> torch.Tensor:
        llama.reset()
        llama.eval(tokens)
        return torch.from_numpy(llama.scores[: len(tokens)].copy())

    yield logits
    llama.close()


def llama_bits(path: Path) -> float:
    """Bits a weight of the linears that the file holds."""
    linears = [
        each for name, each in read_gguf_file(path).tensors.items() if name.startswith("blk.") and len(each.shape) == 2
    ]
    return 8 * sum(each.num_bytes for each in linears) / sum(each.shape[0] * each.shape[1] for each in linears)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="tools whose names begin so")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    loaded = load(demo_model_path(), dtype=torch.float32)
    assert loaded.tokenizer is not None
    calibration, evaluation = (
        [ids[start : start + WINDOW] for start in range(0, most, WINDOW)]
        for ids, most in zip(
            (loaded.tokenizer(text)["input_ids"] for text in halves()),
            (arguments.calibration_tokens, EVALUATION_TOKENS),
            strict=True,
        )
    )

    def reference(tokens: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            return loaded.model(input_ids=torch.tensor([tokens])).logits[0]

    known = json.loads(arguments.output.read_text())["tools"] if arguments.output.exists() else {}

    def measure(name: str, package: str, bits: float, logits: Logits, start: float) -> None:
        quality = asdict(measure_quality(logits, reference, evaluation))
        facts = {**run_facts(), "tool": {package: version(package)}, "seconds": time.perf_counter() - start}
        facts["command"] = facts["command"].replace("quantization.py", "quantization_tools.py")
        known[name] = {"bits_per_weight": bits, "quality": quality, **facts}
        arguments.output.write_text(json.dumps({"schema": 1, "tools": known}, indent=2) + "\n")
        print(f"{name}: {bits:.2f} bits, {quality['mean_nats']:.4f} nats, top-1 {quality['top_1']:.1%}", flush=True)

    for name, (package, bits, quantize) in MODULE_TOOLS.items():
        if name.startswith(arguments.only) and is_installed(package):
            start = time.perf_counter()
            with module_logits(quantize, calibration) as logits:
                measure(name, package, bits, logits, start)
    with tempfile.TemporaryDirectory() as folder:
        for kind in LLAMA_TYPES:
            name = f"llama.cpp {kind}"
            if name.startswith(arguments.only) and is_installed("llama_cpp_python"):
                start = time.perf_counter()
                path = llama_file(kind, Path(folder))
                with llama_logits(path) as logits:
                    measure(name, "llama_cpp_python", llama_bits(path), logits, start)


def is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        print(f"{package} is not installed: left out", flush=True)
        return False
    return True


if __name__ == "__main__":
    main()
