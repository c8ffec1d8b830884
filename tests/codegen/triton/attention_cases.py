"""Attention kernels against their definitions, on any device (see ``kernel_cases.py``)."""

from __future__ import annotations

import math

import torch
from codegen.triton.kernel_cases import DTYPES, assert_near, launch, normal

from infercomp.codegen.ops import attention, paged_attention
from infercomp.codegen.triton.specs import AttentionSpec, PagedAttentionSpec


class PagedBatch:
    """Sequences with caches in shuffled blocks; what lies beyond their ends is NaN."""

    def __init__(self, spec: PagedAttentionSpec, lengths: list[tuple[int, int]], device: str, seed: int = 0) -> None:
        """``lengths``: (query tokens, cached tokens with those) of each sequence."""
        self.spec, self.device = spec, device
        generator = torch.Generator().manual_seed(seed)
        num_blocks = [-(-total // spec.block_size) for _, total in lengths]
        order = torch.randperm(sum(num_blocks) + 1, generator=generator).tolist()
        self.block_tables = torch.zeros(len(lengths), max(num_blocks), dtype=torch.int64)
        self.seq_lens = torch.tensor([total for _, total in lengths])
        self.query_start_loc = torch.tensor([0, *(count for count, _ in lengths)]).cumsum(0)
        shape = (sum(num_blocks) + 1, spec.block_size, spec.num_kv_heads)
        caches = [torch.full((*shape, width), math.nan) for width in (spec.head_dim, spec.value_width)]
        for sequence, (_, total) in enumerate(lengths):
            blocks = [order.pop() for _ in range(num_blocks[sequence])]
            self.block_tables[sequence, : len(blocks)] = torch.tensor(blocks)
            for cache in caches:
                tokens = torch.randn(total, *cache.shape[2:], generator=generator)
                for position in range(0, total, spec.block_size):
                    piece = tokens[position : position + spec.block_size]
                    cache[blocks[position // spec.block_size], : len(piece)] = piece
        self.key_cache, self.value_cache = (cache.to(device, DTYPES[spec.dtype]) for cache in caches)
        num_tokens = int(self.query_start_loc[-1])
        query = torch.randn(num_tokens, spec.num_heads, spec.head_dim, generator=generator)
        self.query = query.to(device, DTYPES[spec.dtype])
        heads = torch.arange(1, spec.num_heads + 1)
        self.alibi_slopes = (-(2.0 ** (-heads / 4))).to(device) if spec.has_alibi else None
        self.sinks = torch.randn(spec.num_heads, generator=generator).to(device) if spec.has_sinks else None
        self.max_query_tokens = max(count for count, _ in lengths)
        self.to(device)

    def to(self, device: str) -> None:
        self.block_tables = self.block_tables.to(device)
        self.seq_lens = self.seq_lens.to(device)
        self.query_start_loc = self.query_start_loc.to(device)

    def only(self, sequence: int) -> PagedBatch:
        """The batch of one sequence, over the same caches."""
        alone = object.__new__(PagedBatch)
        alone.__dict__.update(self.__dict__)
        begin, end = self.query_start_loc[sequence : sequence + 2].tolist()
        alone.query = self.query[begin:end].contiguous()
        alone.query_start_loc = torch.tensor([0, end - begin], device=self.device)
        alone.seq_lens = self.seq_lens[sequence : sequence + 1].clone()
        used = -(-int(alone.seq_lens[0]) // self.spec.block_size)
        alone.block_tables = self.block_tables[sequence : sequence + 1, :used].contiguous()
        alone.max_query_tokens = end - begin
        return alone

    def exact(self) -> torch.Tensor:
        """The definition in float64."""
        spec = self.spec
        return paged_attention.definition(
            self.query.double(),
            self.key_cache.double(),
            self.value_cache.double(),
            self.block_tables,
            self.seq_lens,
            self.query_start_loc,
            self.alibi_slopes,
            self.sinks,
            scale=spec.scale,
            sliding_window=spec.sliding_window,
            logit_softcap=spec.logit_softcap,
        )

    def run(self) -> torch.Tensor:
        """The kernel, with its second stage for split keys."""
        spec, device = self.spec, self.device
        num_tokens, num_heads, width = self.query.shape[0], spec.num_heads, spec.value_width
        max_keys = int(self.seq_lens.max())
        slots = spec.num_chunk_slots(max_keys) if spec.chunk_keys else 1
        named: dict[str, object] = {**self.__dict__, "block_table_stride": self.block_tables.stride(0)}
        named["output"] = torch.full((num_tokens, num_heads, width), math.nan, device=device, dtype=self.query.dtype)
        named["partials"] = torch.full((num_tokens, num_heads, slots, width), math.nan, device=device)
        named["partial_maxima"] = torch.full((num_tokens, num_heads, slots), math.nan, device=device)
        named["partial_sums"] = torch.full((num_tokens, num_heads, slots), math.nan, device=device)
        named["num_chunk_slots"] = slots
        num_sequences = len(self.seq_lens)
        grid = spec.grid(num_sequences, max_query_tokens=self.max_query_tokens, max_keys=max_keys)
        launch(spec, grid, *(named[argument.name] for argument in spec.arguments()))
        if spec.chunk_keys:
            combine = spec.combine()
            launch(combine, combine.grid(num_sequences), *(named[argument.name] for argument in combine.arguments()))
        output = named["output"]
        assert isinstance(output, torch.Tensor)
        return output


def check_paged_attention(
    spec: PagedAttentionSpec, lengths: list[tuple[int, int]], device: str, seed: int = 0, noise: float = 3e-6
) -> None:
    """Against the definition; and each sequence alone gives the same bits as in the batch."""
    batch = PagedBatch(spec, lengths, device, seed)
    found = batch.run()
    assert_near(found, batch.exact(), units=4.0, noise=noise)
    begins = batch.query_start_loc.tolist()
    for sequence in range(len(lengths)):
        together = found[begins[sequence] : begins[sequence + 1]]
        assert torch.equal(batch.only(sequence).run(), together), f"sequence {sequence} depends on the batch"


def check_attention(
    spec: AttentionSpec, batch: int, num_queries: int, num_keys: int, device: str, seed: int = 0, noise: float = 3e-6
) -> None:
    """Inputs are transposed views, as a model makes them; the bias is broadcast over the batch."""
    generator = torch.Generator().manual_seed(seed)

    def heads(length: int, count: int, width: int) -> torch.Tensor:
        packed = normal(batch, length, count, width, dtype=spec.dtype, device=device, generator=generator)
        return packed.transpose(1, 2)

    query = heads(num_queries, spec.num_heads, spec.head_dim)
    key = heads(num_keys, spec.num_kv_heads, spec.head_dim)
    value = heads(num_keys, spec.num_kv_heads, spec.value_width)
    output = torch.full_like(query[..., :1], math.nan).expand(*query.shape[:3], spec.value_width).contiguous()
    slopes = torch.rand(spec.num_heads, generator=generator).to(device) if spec.has_alibi else None
    sinks = torch.randn(spec.num_heads, generator=generator).to(device) if spec.has_sinks else None
    bias = None
    if spec.bias_dtype is not None:
        bias = torch.randn(1, spec.num_heads, num_queries, num_keys, generator=generator).to(device)
        bias = (bias > 0 if spec.bias_dtype == "i1" else bias.to(DTYPES[spec.bias_dtype])).expand(batch, -1, -1, -1)
    named = {"output": output, "query": query, "key": key, "value": value, "bias": bias}
    named |= {"alibi_slopes": slopes, "sinks": sinks}
    numbers: dict[str, object] = {"num_queries": num_queries, "num_keys": num_keys}
    for name in ("output", "query", "key", "value", "bias"):
        tensor = named[name]
        if tensor is not None:
            strides = tensor.stride()[:3]
            numbers |= dict(zip((f"{name}_{axis}_stride" for axis in ("batch", "head", "row")), strides, strict=True))
    every = {**named, **numbers}
    launch(spec, spec.grid(batch, num_queries), *(every[argument.name] for argument in spec.arguments()))
    wide = bias if bias is None or bias.dtype == torch.bool else bias.double()
    exact = attention.definition(
        query.double(),
        key.double(),
        value.double(),
        wide,
        slopes,
        sinks,
        scale=spec.scale,
        sliding_window=spec.sliding_window,
        logit_softcap=spec.logit_softcap,
        is_causal=spec.is_causal,
    )
    assert_near(output, exact, units=4.0, noise=noise)
