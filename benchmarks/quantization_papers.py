"""The claims of the quantisation papers, in kind: what each method beats, at equal bits, on a small BERT and SmolLM2.

The BERTs are those of ``small_bert.py``, one as it is trained, one with outlier channels; the decoder is SmolLM2. Rows
marked simulated are what a paper compares with and infercomp does not offer: weights rounded in floats. The measure is
the divergence from the same model in float32, over masked characters (BERT) or over 4,096 tokens (SmolLM2) of the half
of the text that nothing was trained or calibrated on.

    python benchmarks/quantization_papers.py --trained ~/.cache/small-bert
    python benchmarks/quantization_papers.py --papers zeroquant,gobo
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attention_conversion import NUM_BLOCKS, WINDOW, demo_model, prose
from cold_start import cpu_model, current_commit
from quantization import PACKAGES, halves
from simulated_rounding import (
    Change,
    head_wise,
    layer_wise,
    linear_bins,
    without_outliers,
)
from small_bert import HEADS, STEPS, Batch, batches, trained
from torch import Tensor, fx

from infercomp import GOBO, HAWQ, LLM, W3A16, W4A16, W8A8, LayerRecipes
from infercomp.account import size_of
from infercomp.bench.agreement import nats_of_tokens
from infercomp.capture import capture_export
from infercomp.passes.calibration import Calibration
from infercomp.passes.cluster_weights import fitted_centroids, is_outlier
from infercomp.passes.config import PassConfig
from infercomp.passes.linear_recipes import LinearRecipe, Recipe
from infercomp.passes.pipeline import run_pipeline
from infercomp.quality import measure_quality
from infercomp.served_model import ServedLinear

RESULTS = Path(__file__).parent / "results" / "quantization_papers.json"
CALIBRATION_BATCHES, EVALUATION_BATCHES = 4, 8
RANDOM_DRAWS = 3
PLAIN, OUTLIERS, DECODER = "BERT", "BERT with outlier channels", "SmolLM2"


@dataclass(frozen=True)
class Row:
    """A way to quantise: a recipe, or weights changed in floats."""

    name: str
    method: LinearRecipe | Change
    bits: float | None = None
    """Of a simulated row, per weight; of a recipe it is counted."""


@dataclass(frozen=True)
class Claim:
    """The first row is to diverge less than each other one."""

    paper: str
    text: str
    model: str
    rows: tuple[Row, ...]


CLAIMS = {
    "zeroquant": [
        Claim(
            "ZeroQuant (Yao et al. 2022)",
            "a scale for each token, found as it comes, beats one for the tensor found before",
            model,
            (
                Row("a scale for each token (`zeroquant`)", W8A8()),
                Row("a scale for each tensor (`w8a8-static`)", W8A8(activation_scale="tensor")),
            ),
        )
        for model in (PLAIN, OUTLIERS)
    ],
    "bondarenko": [
        Claim(
            "Bondarenko et al. 2021",
            "16 bits for the tensors that 8 bits harm bring back what outlier channels cost",
            OUTLIERS,
            (
                Row("harmful tensors in floats", W8A8(activation_scale="tensor", harmful_error=0.01)),
                Row("a scale for each tensor (`w8a8-static`)", W8A8(activation_scale="tensor")),
            ),
        ),
        Claim(
            "PEG (Bondarenko et al. 2021)",
            "groups of channels sorted by range bring it back in 8 bits; where the groups end matters",
            OUTLIERS,
            (
                Row("4 groups fitted to the ranges", W8A8(embedding_groups=4, embedding_group_sizes="fitted")),
                Row("4 even groups", W8A8(embedding_groups=4)),
                Row("a scale for each token (`w8a8`)", W8A8()),
                Row("a scale for each tensor (`w8a8-static`)", W8A8(activation_scale="tensor")),
            ),
        ),
    ],
    "llm-int8": [
        Claim(
            "LLM.int8() (Dettmers et al. 2022)",
            "outlier channels in floats make 8 bits as good as floats",
            OUTLIERS,
            (
                Row("channels from 6.0 on in floats (`llm-int8`)", W8A8(outlier_threshold=6.0)),
                Row("a scale for each token (`w8a8`)", W8A8()),
            ),
        )
    ],
    "gobo": [
        Claim(
            "GOBO (Zadeh et al. 2020)",
            "at 3 bits its centroids beat those of K-means and even steps, and outliers have to be kept",
            PLAIN,
            (
                Row("GOBO (`gobo`)", GOBO(bits=3)),
                Row("the same outliers, K-means (`gobo-squares`)", GOBO(bits=3, fit="squares")),
                Row("the same outliers, even steps", linear_bins(3), 3.0),
                Row("its centroids, no outliers", without_outliers(3), 3.0),
                Row("one grid a layer", layer_wise(3), 3.0),
            ),
        )
    ],
    "qbert": [
        Claim(
            "Q-BERT (Shen et al. 2020)",
            f"at {bits} bits groups beat one grid a layer, and smaller groups a group for each head",
            PLAIN,
            (
                Row("a grid for 128 channels of a row", made(128, True)),
                Row("a grid for each head", head_wise(bits, HEADS), float(bits)),
                Row("one grid a layer", layer_wise(bits), float(bits)),
            ),
        )
        for bits, made in ((4, W4A16), (3, W3A16))
    ],
}


# BERT


class Bert:
    """A trained model, and what it says of masked characters in floats."""

    def __init__(self, folder: Path, has_outliers: bool, steps: int) -> None:
        self.model = trained(folder, has_outliers, steps)
        self.calibration = batches(halves()[0], CALIBRATION_BATCHES, seed=2)
        self.evaluation = batches(halves()[1], EVALUATION_BATCHES, seed=3)
        self.expected = self._logits(lambda ids: self.model(input_ids=ids).logits)

    def _logits(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Of the masked characters, [M, V]."""
        with torch.no_grad():
            return torch.cat([function(batch.input_ids)[batch.is_masked] for batch in self.evaluation])

    def measured(self, row: Row) -> dict[str, Any]:
        if isinstance(row.method, LinearRecipe):
            graph = quantized_graph(copy.deepcopy(self.model), row.method, self.calibration)
            return {"bits": mean_bits(self.model, row.method), **self._quality(self._logits(graph))}
        return {"bits": row.bits, **self._quality(self._logits(changed(self.model, row.method)))}

    def reference(self) -> dict[str, Any]:
        return {"name": "float32", "is_simulated": False, "bits": 32.0, **self._quality(self.expected)}

    def _quality(self, logits: Tensor) -> dict[str, float]:
        characters = torch.cat([batch.expected[batch.is_masked] for batch in self.evaluation])
        return {
            "mean_nats": float(nats_of_tokens(logits.double(), self.expected.double()).mean()),
            "accuracy": float((logits.argmax(-1) == characters).double().mean()),
            "loss": float(F.cross_entropy(logits, characters)),
        }


def quantized_graph(model: Any, recipe: LinearRecipe, calibration: Sequence[Batch]) -> Callable[[Tensor], Tensor]:
    """What the passes make of the model, with the weights as the graph's own, computed by its definitions."""
    model_graph = capture_export(
        model, {"input_ids": calibration[0].input_ids}, max_length=calibration[0].input_ids.shape[1]
    )
    samples = tuple({model_graph.input_names[0]: batch.input_ids} for batch in calibration)
    config = PassConfig(quantization=recipe, quantize_lm_head=False)
    records = run_pipeline(model_graph, config, calibration=Calibration(samples))
    if not any(record.matches for record in records if record.name == "quantize_linears"):
        raise RuntimeError("no linear was quantised")
    placeholders = [node.name for node in model_graph.graph.nodes if node.op == "placeholder"]

    def logits(input_ids: Tensor) -> Tensor:
        values = {**model_graph.weights, model_graph.input_names[0]: input_ids}
        return fx.Interpreter(model_graph.graph_module).run(*(values[name] for name in placeholders))[0]

    return logits


def changed(model: Any, change: Change) -> Callable[[Tensor], Tensor]:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for linear in encoder_linears(model):
            linear.weight.copy_(change(linear.weight))
    return lambda ids: model(input_ids=ids).logits


def encoder_linears(model: Any) -> Iterator[torch.nn.Linear]:
    """All but the one that makes logits."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "cls.predictions.decoder":
            yield module


def mean_bits(model: Any, recipe: LinearRecipe) -> float:
    weights = [linear.weight for linear in encoder_linears(model)]
    return sum(recipe.bits_per_weight(w.shape[1]) * w.numel() for w in weights) / sum(w.numel() for w in weights)


def bert_claims(names: Sequence[str], folder: Path, steps: int = STEPS) -> Iterator[dict[str, Any]]:
    berts: dict[str, Bert] = {}
    for claim in [claim for name in names for claim in CLAIMS.get(name, [])]:
        if claim.model not in berts:
            berts[claim.model] = Bert(folder, claim.model == OUTLIERS, steps)
        bert = berts[claim.model]
        rows = []
        for row in claim.rows:
            rows.append(
                {"name": row.name, "is_simulated": not isinstance(row.method, LinearRecipe), **bert.measured(row)}
            )
            print(
                f"{claim.paper}, {claim.model}, {row.name}: KL {rows[-1]['mean_nats']:.4f}", file=sys.stderr, flush=True
            )
        found = described(claim, [*rows, bert.reference()])
        yield {**found, "iterations": iterations(bert.model)} if claim.paper.startswith("GOBO") else found


def described(claim: Claim, rows: list[dict[str, Any]]) -> dict[str, Any]:
    best, *others = [row["mean_nats"] for row in rows if row["name"] != "float32"]
    facts = {"paper": claim.paper, "claim": claim.text, "model": claim.model}
    return {**facts, "holds": all(best < each for each in others), "rows": rows}


def iterations(model: Any) -> dict[str, float]:
    """Of GOBO and of K-means from the same start, the mean over layers."""
    ours, theirs = [], []
    for linear in encoder_linears(model):
        values = linear.weight.detach()[~is_outlier(linear.weight, GOBO().outlier_log_density)]
        ours.append(len(fitted_centroids(values, 8)[1]))
        theirs.append(len(fitted_centroids(values, 8, "squares")[1]))
    return {"gobo": sum(ours) / len(ours), "k_means": sum(theirs) / len(theirs)}


# SmolLM2


@dataclass(frozen=True)
class Unit:
    """Layers that read one input and so get one recipe."""

    layers: tuple[str, ...]
    num_weights: int
    is_chosen: bool
    """Whether HAWQ gave it the first of its choices, that of more bits."""


def hawq_claim() -> dict[str, Any]:
    """Layers that HAWQ gives 8 bits against others that get them in its place, at the same bits."""
    tokenizer = demo_model()[1]
    calibration, evaluation = prose(8192)(tokenizer)
    windows = [window.tolist() for window in evaluation.split(WINDOW)]
    reference = LLM(*demo_model(), num_blocks=NUM_BLOCKS)
    expected = {tuple(window): reference.logits(window) for window in windows}
    del reference

    def measured(name: str, recipe: Recipe) -> tuple[dict[str, Any], LLM]:
        data = calibration if recipe.needs_calibration else None
        options: dict[str, Any] = {"quantization": recipe, "quantize_lm_head": False, "calibration": data}
        llm = LLM(*demo_model(), num_blocks=NUM_BLOCKS, **options)
        quality = asdict(measure_quality(llm.logits, lambda window: expected[tuple(window)], windows))
        print(f"HAWQ, {name}: KL {quality['mean_nats']:.4f}", file=sys.stderr, flush=True)
        bits = size_of(llm._served).bits_per_weight
        return {"name": name, "is_simulated": False, "bits": bits, **quality}, llm

    recipe = HAWQ()
    chosen, llm = measured("layers by the Hessian's trace (`hawq`)", recipe)
    units = units_of(llm)
    del llm
    orders = {"the layers that it left at 4 bits first": sorted(units, key=lambda unit: unit.is_chosen)}
    for seed in range(RANDOM_DRAWS):
        orders[f"layers drawn at random, {seed + 1}"] = random.Random(seed).sample(units, len(units))
    rows = [chosen, *(measured(name, with_first(order, recipe))[0] for name, order in orders.items())]
    text = "at the same bits, layers chosen by the Hessian of the loss beat others"
    return described(Claim("HAWQ-V2 (Dong et al. 2020)", text, DECODER, ()), rows)


def units_of(llm: LLM) -> list[Unit]:
    """In the order of the layers; the LM head is none."""
    by_input: dict[str, list[ServedLinear]] = {}
    for each in llm._served.form.linears:
        if not each.is_head:
            by_input.setdefault(_input_of(each.name), []).append(each)
    return [
        Unit(
            tuple(each.name for each in linears), sum(each.num_weights for each in linears), linears[0].weight_bits == 8
        )
        for linears in by_input.values()
    ]


def _input_of(layer: str) -> str:
    readers = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
    block, _, own = layer.rpartition(".")
    return f"{block}.{readers.get(own, own)}"


def with_first(order: Sequence[Unit], recipe: HAWQ) -> LayerRecipes:
    """The first choice for units in this order, as long as they are no more weights than HAWQ gave it to."""
    room = sum(unit.num_weights for unit in order if unit.is_chosen)
    layers: list[tuple[str, LinearRecipe | None]] = []
    for unit in order:
        if unit.num_weights <= room:
            room -= unit.num_weights
            layers += [(layer, recipe.choices[0]) for layer in unit.layers]
    return LayerRecipes((*layers, ("*", recipe.choices[1])))


def run_facts() -> dict[str, Any]:
    return {
        "command": shlex.join(["python", "benchmarks/quantization_papers.py", *sys.argv[1:]]),
        "commit": current_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in PACKAGES},
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def write(path: Path, claim: Mapping[str, Any]) -> None:
    """In place of the same claim, or behind the others."""

    def key(each: Mapping[str, Any]) -> tuple[str, ...]:
        return each["paper"], each["model"], each["claim"]

    known = json.loads(path.read_text())["claims"] if path.exists() else []
    kept = [each for each in known if key(each) != key(claim)]
    path.write_text(json.dumps({"schema": 1, "claims": [*kept, {**claim, **run_facts()}]}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--papers", default=",".join([*CLAIMS, "hawq"]), help="names with commas between them")
    parser.add_argument("--trained", type=Path, help="a folder that keeps the trained models; else they are lost")
    parser.add_argument("--steps", type=int, default=STEPS, help="batches that each BERT is trained on")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    names = arguments.papers.split(",")
    unknown = [name for name in names if name not in (*CLAIMS, "hawq")]
    if unknown:
        parser.error(f"--papers: no {unknown[0]!r}; valid: {', '.join([*CLAIMS, 'hawq'])}")
    with tempfile.TemporaryDirectory() as scratch:
        for claim in bert_claims(names, arguments.trained or Path(scratch), arguments.steps):
            write(arguments.output, claim)
    if "hawq" in names:
        write(arguments.output, hawq_claim())


if __name__ == "__main__":
    main()
