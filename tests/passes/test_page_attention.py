"""A served step with a real paged cache computes what the uncached model does, or the model is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from infercomp.capture import capture_export
from infercomp.codegen.model_graph import ModelGraph, value_of
from infercomp.passes.pipeline import PIPELINE
from infercomp.passes.verify import evaluate, relative_error, tape_of
from infercomp.runtime.errors import ProofError
from tests.graph_testing import run_passes

VOCABULARY, WIDTH, HEADS, BLOCK_SIZE, NUM_BLOCKS = 11, 8, 2, 2, 40
Mask = Callable[[int], torch.Tensor]


def distance(length: int) -> torch.Tensor:
    return torch.arange(length)[:, None] - torch.arange(length)[None]


class Decoder(nn.Module):
    """Two layers of attention under ``mask``; positions by a learned table, by a rotation, or by the mask alone."""

    def __init__(self, mask: Mask | None, positions: str = "table") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mask, self.positions = mask, positions
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.table = nn.Embedding(64, WIDTH)
        self.projections = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.double()

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(input_ids)
        length = input_ids.shape[1]
        if self.positions == "table":
            hidden = hidden + self.table(position_ids)
        elif self.positions == "counted":
            hidden = hidden + self.table(torch.arange(length) + 1)
        for projection in self.projections:
            hidden = hidden + self.attend(projection(F.layer_norm(hidden, (WIDTH,))))
        return self.head(hidden)

    def attend(self, projected: torch.Tensor) -> torch.Tensor:
        batch, length, _ = projected.shape
        query, key, value = projected.reshape(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        if self.mask is None:
            output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            bias = self.mask(length)
            bias = bias if bias.dtype == torch.bool else bias.double()
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return output.transpose(1, 2).reshape(batch, length, WIDTH)


class LlamaLogits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
        self.model = LlamaForCausalLM(config).eval().double()

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits


def alibi(length: int) -> torch.Tensor:
    slopes = torch.tensor([0.5, 0.25])[:, None, None]
    hidden = torch.zeros(length, length).masked_fill(distance(length) < 0, -math.inf)
    return (slopes * -distance(length)[None] + hidden)[None]


def window(length: int) -> torch.Tensor:
    return (distance(length) >= 0) & (distance(length) < 3)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "causal": lambda: Decoder(None),
    "causal_by_mask": lambda: Decoder(lambda length: distance(length) >= 0),
    "window": lambda: Decoder(window),
    "alibi": lambda: Decoder(alibi, positions="none"),
    "counted_positions": lambda: Decoder(None, positions="counted"),
    "llama": LlamaLogits,
}


def example(length: int = 5) -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "position_ids": torch.arange(length)[None]}


def served(model: nn.Module, **options: Any) -> ModelGraph:
    model_graph = capture_export(model, example(), max_length=63)
    run_passes(model_graph, *PIPELINE, inputs=[example()[name] for name in model_graph.input_names], **options)
    return model_graph


_SERVED: dict[str, tuple[ModelGraph, ModelGraph]] = {}


def served_once(name: str) -> tuple[ModelGraph, ModelGraph]:
    """The model's graph as it was captured, and as it is served."""
    if name not in _SERVED:
        model = MODELS[name]()
        _SERVED[name] = capture_export(model, example(), max_length=63), served(model)
    return _SERVED[name]


def run_graph(model_graph: ModelGraph, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits in float64 throughout, casts inside of the model too; caches are written in place."""
    with torch.no_grad():
        (logits,), _ = evaluate(tape_of(model_graph), {**model_graph.weights, **inputs})
    return logits


class Caches:
    """The blocks of several sequences in caches whose unused slots hold NaN."""

    def __init__(self, model_graph: ModelGraph, order: list[int]) -> None:
        self.graph = model_graph
        self.free = list(order)
        self.blocks: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}
        self.tensors = {
            name: torch.full(
                (NUM_BLOCKS, BLOCK_SIZE, *value_of(model_graph.placeholder(name)).shape[2:]),
                math.nan,
                dtype=torch.float64,
            )
            for name in model_graph.input_names
            if name.startswith("layer_")
        }

    def step(self, chunks: list[tuple[int, torch.Tensor]]) -> list[torch.Tensor]:
        """Logits of every token of every (sequence, next ids)."""
        places = [list(self._places(sequence, ids.numel())) for sequence, ids in chunks]
        starts = torch.tensor([0, *(ids.numel() for _, ids in chunks)]).cumsum(0)
        width = max(len(self.blocks[sequence]) for sequence, _ in chunks)
        step = {
            "input_ids": torch.cat([ids for _, ids in chunks]),
            "positions": torch.tensor([position for each in places for position, _ in each]),
            "slot_mapping": torch.tensor([slot for each in places for _, slot in each]),
            "block_tables": torch.tensor(
                [self.blocks[sequence] + [0] * (width - len(self.blocks[sequence])) for sequence, _ in chunks]
            ),
            "seq_lens": torch.tensor([self.lengths[sequence] for sequence, _ in chunks]),
            "query_start_loc": starts,
            "logits_indices": torch.arange(int(starts[-1])),
            **self.tensors,
        }
        logits = run_graph(self.graph, step)
        return list(logits[0].split([ids.numel() for _, ids in chunks]))

    def _places(self, sequence: int, count: int) -> Iterator[tuple[int, int]]:
        blocks, first = self.blocks.setdefault(sequence, []), self.lengths.get(sequence, 0)
        for position in range(first, first + count):
            if position == len(blocks) * BLOCK_SIZE:
                blocks.append(self.free.pop())
            yield position, blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        self.lengths[sequence] = first + count


@st.composite
def schedules(draw: st.DrawFn) -> tuple[list[int], list[list[tuple[int, int]]], list[int]]:
    """(lengths, steps, block order): each step gives some sequences their next few tokens."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    left, steps = dict(enumerate(lengths)), []
    while left:
        chosen = draw(st.lists(st.sampled_from(sorted(left)), min_size=1, unique=True))
        steps.append([(sequence, draw(st.integers(1, left[sequence]))) for sequence in chosen])
        for sequence, count in steps[-1]:
            left[sequence] -= count
        left = {sequence: count for sequence, count in left.items() if count}
    return lengths, steps, draw(st.permutations(range(NUM_BLOCKS)))


def check_schedule(name: str, schedule: tuple[list[int], list[list[tuple[int, int]]], list[int]]) -> None:
    """The steps of a schedule, put together, are the uncached forward of every sequence."""
    captured_graph, model_graph = served_once(name)
    lengths, steps, order = schedule
    inputs = [example(length) for length in lengths]
    caches, found = Caches(model_graph, order), [[] for _ in lengths]
    for step in steps:
        chunks = []
        for sequence, count in step:
            start = caches.lengths.get(sequence, 0)
            chunks.append((sequence, inputs[sequence]["input_ids"][0, start : start + count]))
        for (sequence, _), logits in zip(step, caches.step(chunks), strict=True):
            found[sequence].append(logits)
    for sequence, given_inputs in enumerate(inputs):
        expected = run_graph(captured_graph, given_inputs)[0]
        assert relative_error(expected, torch.cat(found[sequence])) <= 1e-9


@pytest.mark.parametrize("name", MODELS)
def test_steps_with_a_cache_are_the_uncached_forward(name: str) -> None:
    served_once(name)

    @settings(max_examples=8, derandomize=True, database=None)
    @given(schedules())
    def check(schedule: Any) -> None:
        check_schedule(name, schedule)

    check()


def _slots_off_by_one(step: dict[str, torch.Tensor]) -> None:
    step["slot_mapping"] = (step["slot_mapping"] + 1) % (NUM_BLOCKS * BLOCK_SIZE)


def _lengths_off_by_one(step: dict[str, torch.Tensor]) -> None:
    step["seq_lens"] = (step["seq_lens"] - 1).clamp(min=1)


def _positions_shifted(step: dict[str, torch.Tensor]) -> None:
    step["positions"] = step["positions"] + 1


def _sequences_swapped(step: dict[str, torch.Tensor]) -> None:
    step["block_tables"] = step["block_tables"].flip(0)


@pytest.mark.parametrize("planted", [_slots_off_by_one, _lengths_off_by_one, _positions_shifted, _sequences_swapped])
def test_a_planted_wrong_step_is_caught(
    planted: Callable[[dict[str, torch.Tensor]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = run_graph

    def wrong(model_graph: ModelGraph, step: dict[str, torch.Tensor]) -> torch.Tensor:
        if "slot_mapping" in step:
            planted(step)
        return right(model_graph, step)

    monkeypatch.setattr(f"{__name__}.run_graph", wrong)
    first = settings(max_examples=40, derandomize=True, database=None, phases=[Phase.generate])
    with pytest.raises(AssertionError):
        first(given(schedules())(lambda schedule: check_schedule("causal", schedule)))()


@pytest.mark.parametrize("option", ["sliding_window", "scale"])
def test_a_dropped_option_is_caught(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    captured_graph, model_graph = served_once("window")[0], served(MODELS["window"]())
    for node in model_graph.graph.nodes:
        if option in node.kwargs:
            wrong = {"sliding_window": None, "scale": 0.9}[option]
            node.kwargs = {**node.kwargs, option: wrong}
    monkeypatch.setitem(_SERVED, "window", (captured_graph, model_graph))
    with pytest.raises(AssertionError):
        check_schedule("window", ([8], [[(0, 8)]], list(range(NUM_BLOCKS))))


REFUSED: dict[str, tuple[Mask, str, str]] = {
    "bidirectional": (lambda n: torch.ones(n, n, dtype=torch.bool), "attends to later tokens", ""),
    "prefix": (
        lambda n: (distance(n) >= 0) | (torch.arange(n)[None] < 3),
        "the mask of .* is not causal",
        "###.....\n    ###.....\n    ###.....\n    ####....",
    ),
    "both_directions": (lambda n: distance(n).abs() < 2, "visible from distance -1", "##......\n    ###....."),
    "unknown": (lambda n: distance(n) % 2 >= 0, "is not known when compiling", "????????"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mask_that_is_not_causal_is_refused_with_its_picture_and_line(name: str) -> None:
    mask, reason, picture = REFUSED[name]
    with pytest.raises(ProofError, match=reason) as caught:
        served(Decoder(mask))
    assert picture in str(caught.value)
    assert "test_page_attention.py" in str(caught.value.where)
    assert "self.attend(" in str(caught.value.where)


class MeanOfTokens(Decoder):
    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        logits = super().forward(input_ids, position_ids)
        return logits - logits.mean(1, keepdim=True)


class NoAttention(Decoder):
    def attend(self, projected: torch.Tensor) -> torch.Tensor:
        return projected[..., :WIDTH]


class FewerTokens(Decoder):
    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids, position_ids)[:, -1]


class ExtraInput(Decoder):
    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids, position_ids) * weights[..., None]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (MeanOfTokens, "reduces over the tokens"),
        (FewerTokens, "some of the tokens|one of the tokens"),
        (NoAttention, "no attention was recognised"),
    ],
)
def test_a_model_that_is_not_token_wise_is_refused(model: type[Decoder], reason: str) -> None:
    with pytest.raises(ProofError, match=reason) as caught:
        served(model(None))
    assert caught.value.pass_name == "page_attention"


def test_the_model_itself_agrees_with_its_captured_graph() -> None:
    """What the steps are compared with is the model."""
    model = MODELS["alibi"]()
    with torch.no_grad():
        assert relative_error(model(**example()), run_graph(served_once("alibi")[0], example())) <= 1e-9


def test_a_model_that_reads_an_extra_input_is_refused() -> None:
    inputs = {**example(), "weights": torch.ones(1, 5, dtype=torch.float64)}
    model_graph = capture_export(ExtraInput(None), inputs, max_length=63)
    with pytest.raises(ProofError, match="takes weights, which no step provides"):
        run_passes(model_graph, *PIPELINE)


@pytest.mark.parametrize("options", [{"disable": ("page_attention#0",)}, {"disable": ("page_attention#1",)}])
def test_no_layer_can_be_left_without_a_cache(options: dict[str, Any]) -> None:
    with pytest.raises(ProofError, match="serving needs a cache under every attention"):
        served(Decoder(None), **options)
