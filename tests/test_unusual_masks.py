"""Masks that no cache can be built on: compiled as they are by torch.compile, refused by ``LLM`` with a picture."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from references import assert_errs_like_eager, watched_compilations
from torch import nn
from torch.nn import functional

from infercomp import LLM, ProofError

VOCAB_SIZE = 64
WIDTH = 32
NUM_HEADS = 4
NUM_LAYERS = 2
PREFIX_LENGTH = 5
DOCUMENT_LENGTH = 4
NUM_POSITIONS = 64


def prefix_mask(decoder: Decoder, length: int) -> torch.Tensor:
    """Causal, but the first five tokens see one another both ways."""
    order = torch.arange(length)
    return (order[None, :] <= order[:, None]) | (order[None, :] < PREFIX_LENGTH)


def document_mask(decoder: Decoder, length: int) -> torch.Tensor:
    """Causal inside documents of four tokens."""
    order = torch.arange(length)
    same = (order[None, :] // DOCUMENT_LENGTH) == (order[:, None] // DOCUMENT_LENGTH)
    return same & (order[None, :] <= order[:, None])


def learned_mask(decoder: Decoder, length: int) -> torch.Tensor:
    """A trained bias for every pair of positions."""
    return decoder.pair_bias[:length, :length]


MaskMaker = Callable[["Decoder", int], torch.Tensor]
MASKS: dict[str, MaskMaker] = {"prefix": prefix_mask, "documents": document_mask, "learned": learned_mask}


class Block(nn.Module):
    """Attention and a feed-forward layer, both behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.projection = nn.Linear(WIDTH, 3 * WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length, _ = hidden.shape
        parts = self.projection(self.attention_norm(hidden)).chunk(3, dim=-1)
        query, key, value = (part.view(batch, length, NUM_HEADS, -1).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        hidden = hidden + self.output(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return hidden + self.mlp(self.mlp_norm(hidden))


class Decoder(nn.Module):
    """A small language model that takes its mask from one function."""

    def __init__(self, make_mask: MaskMaker) -> None:
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=NUM_POSITIONS)
        self.make_mask = make_mask
        self.tokens = nn.Embedding(VOCAB_SIZE, WIDTH)
        self.positions = nn.Embedding(NUM_POSITIONS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_LAYERS))
        self.pair_bias = nn.Parameter(torch.randn(NUM_POSITIONS, NUM_POSITIONS) * 2)
        self.head = nn.Linear(WIDTH, VOCAB_SIZE)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        length = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(length)[None]
        hidden = self.tokens(input_ids) + self.positions(position_ids)
        mask = self.make_mask(self, length)
        for block in self.blocks:
            hidden = block(hidden, mask)
        return self.head(hidden)


def decoder(make_mask: MaskMaker) -> Decoder:
    torch.manual_seed(0)
    return Decoder(make_mask).eval().requires_grad_(False)


def token_ids(length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", MASKS)
def test_compiles_with_the_mask_kept(name: str) -> None:
    model = decoder(MASKS[name])
    wide = copy.deepcopy(model).double()
    with watched_compilations() as watch, torch.inference_mode():
        compiled = torch.compile(model, backend="infercomp", options={"verify": True, "strict": True})
        for length in (13, 18, 9):
            ids = token_ids(length)
            exact = wide(ids)
            assert_errs_like_eager(exact, model(ids), compiled(ids))
            causal = decoder(causal_mask).double()(ids)
            assert float((exact - causal).abs().max()) > 0.1, "the mask hardly matters: a causal one would pass too"
    assert watch.num_calls <= 2
    for report in watch.reports:
        assert report.matches_of("recognize_attention") == NUM_LAYERS
        assert report.matches_of("recognize_masks") == 0
        reasons = [m.reason for record in report.passes if record.name == "recognize_masks" for m in record.near_misses]
        assert len(reasons) == NUM_LAYERS and all(reasons)


def causal_mask(decoder: Decoder, length: int) -> torch.Tensor:
    order = torch.arange(length)
    return order[None, :] <= order[:, None]


@pytest.mark.parametrize("name", MASKS)
def test_llm_refuses_and_shows_the_mask(name: str) -> None:
    model = decoder(MASKS[name])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ProofError) as caught:
        LLM(model)
    error = caught.value
    assert error.pass_name == "page_attention"
    assert error.where is not None and "test_unusual_masks.py" in error.where
    assert "torch.compile" in str(error.remedy)
    picture = [line.strip() for line in str(error).splitlines() if line.strip() and set(line.strip()) <= set("#.? ")]
    assert len(picture) >= 6, str(error)
    assert picture_agrees(picture, model, name), str(error)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def picture_agrees(picture: list[str], model: Decoder, name: str) -> bool:
    """Every cell that claims to know is right; a learned mask is all unknown, a prefix all known."""
    if name == "learned":
        return all(set(line) <= {"?", " "} for line in picture)
    rows = [line.replace(" ", "") for line in picture]
    mask = MASKS[name](model, len(rows))
    cells = [(cell, bool(mask[q, k])) for q, row in enumerate(rows) for k, cell in enumerate(row[: len(rows)])]
    known = [(cell == "#", truth) for cell, truth in cells if cell != "?"]
    least = len(cells) if name == "prefix" else len(cells) // 3
    return len(known) >= least and all(shown == truth for shown, truth in known)


def test_the_same_decoder_is_served_once_its_mask_is_causal() -> None:
    """What is refused above is the mask, not the module."""
    llm = LLM(decoder(causal_mask), num_blocks=4)
    found = llm.logits(token_ids(12)[0].tolist())
    model = decoder(causal_mask)
    assert_errs_like_eager(model.double()(token_ids(12))[0], decoder(causal_mask)(token_ids(12))[0], found)


def test_a_refusal_leaves_nothing_behind() -> None:
    def live_graphs() -> int:
        gc.collect()
        return sum(isinstance(each, torch.fx.GraphModule) for each in gc.get_objects())

    model = decoder(prefix_mask)
    with pytest.raises(ProofError):
        LLM(model)
    before = live_graphs()
    with pytest.raises(ProofError):
        LLM(model)
    assert live_graphs() <= before
