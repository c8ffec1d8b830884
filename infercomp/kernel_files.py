"""Each generated kernel of a graph as two files: its C++ text, and a Python file that builds, checks and times it.

    kernels/matmul_0123456789ab.cpp   kernels/matmul_0123456789ab.py

``python kernels/matmul_….py`` runs the text beside it, edited or not, against the definition of the ops that it
was made from; ``kernel_overrides`` loads an edited text back into the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from .codegen.config import CodegenConfig
from .codegen.cpp.emit import emit_units
from .codegen.grouping import Group, Planner
from .codegen.indexing import product, size_expr
from .codegen.kernel_set import origin_of
from .codegen.lower import kernel_language
from .codegen.model_graph import ModelGraph, source_line, value_of
from .codegen.ops import paged_attention
from .codegen.packing import HALF_PANEL
from .codegen.regions import PackedWeight, is_inlined
from .codegen.specs import AttentionSpec, MatmulSpec, spec_name, symbols_of
from .codegen.triton.emit_specs import emit_spec
from .graph_text import argument_text, target_text
from .kernel_inputs import InputKinds

# Sizes of a step that capturing leaves open: a few sequences over a cache of a realistic shape.
_STEP_SIZES = {"sequences": 2, "table_width": 8, "blocks": 32, "block_size": 16}


def kernel_files(model_graph: ModelGraph, config: CodegenConfig) -> dict[str, str]:
    """File names and texts, two for each C++ kernel of this graph and one for each Triton kernel."""
    language = kernel_language(model_graph, config)
    if language is None:
        return {}
    if language == "triton":
        return dict(_triton_files(Planner(model_graph, language).plan().groups))
    files: dict[str, str] = {}
    for group in Planner(model_graph).plan().groups:
        name = spec_name(group.spec)
        if f"{name}.cpp" not in files:
            (text,) = emit_units({name: group.spec}, {name: list(origin_of(group))}, 1)
            files[f"{name}.cpp"] = text
            files[f"{name}.py"] = _KernelFile(group, name, model_graph, config).text()
    return files


def _triton_files(groups: Sequence[Group]) -> Iterator[tuple[str, str]]:
    for group in groups:
        header = "".join(f"# {line}\n" for line in origin_of(group))
        for launch in emit_spec(group.spec, spec_name(group.spec)).launches:
            yield f"{launch.name}.py", header + launch.text


class _KernelFile:
    """The Python file of one kernel."""

    def __init__(self, group: Group, name: str, model_graph: ModelGraph, config: CodegenConfig) -> None:
        self._group, self._name, self._config = group, name, config
        self._order = {node: i for i, node in enumerate(model_graph.graph.nodes)}
        self._inside = set(group.nodes)
        self._sources = {source for source in group.sources if isinstance(source, fx.Node)}
        self._sizes = {symbol: sympy.Symbol(f"n{i}") for i, symbol in enumerate(group.symbols)}
        self._body: dict[fx.Node, None] = {}
        self._leaves: dict[fx.Node, None] = {}
        for node in group.nodes:
            self._visit(node)
        self._kinds = InputKinds(self._body, self._leaves, self._size)
        self._hints = self._recorded_sizes(model_graph)

    def text(self) -> str:
        statements = "\n".join(f"    {line}" for line in self._statements())
        leaves = sorted(self._leaves, key=self._order.__getitem__)
        # What is summed must be drawn before its sums.
        inputs = sorted((self._input(leaf) for leaf in leaves), key=lambda text: '"sums"' in text)
        names = [re.match(r'Input\("(\w+)"', text).group(1) for text in inputs]  # type: ignore[union-attr]
        sizes = [f"{name} = {self._hints[symbol]}" for symbol, name in self._sizes.items()]
        return _TEMPLATE.format(
            name=self._name,
            origin="\n".join(origin_of(self._group)),
            sizes="\n".join(sizes) or "# None: every size is fixed.",
            used=_tuple([s.name for s in symbols_of(self._group.spec)]),
            inputs="".join(f"        {text},\n" for text in inputs),
            operands="".join(f"        {self._operand(source)},\n" for source in self._group.sources),
            results="".join(f"        {self._result(node)},\n" for node in self._group.results),
            written=tuple(node.name for node in self._written()),
            tables=tuple(sorted(node.name for node in self._kinds.tables())),
            operations=self._num_operations(),
            rounds=self._rounds_to_integers(),
            instruction_set=self._config.instruction_set,
            arguments=", ".join(["types", *names]),
            statements=statements,
        )

    def _visit(self, node: fx.Node) -> None:
        if node in self._body or node in self._leaves or not _holds_tensors(node):
            return
        if node not in self._inside and (node in self._sources or not is_inlined(node)):
            self._leaves[node] = None
            return
        for source in node.all_input_nodes:
            self._visit(source)
        self._body[node] = None

    def _statements(self) -> Iterator[str]:
        previous = None
        for node in sorted(self._body, key=self._order.__getitem__):
            line = source_line(node)
            if line is not None and line != previous:
                yield f"# {line}"
                previous = line
            operands = [self._argument(argument) for argument in node.args]
            operands += [f"{key}={self._argument(value)}" for key, value in node.kwargs.items()]
            yield f"{node.name} = {target_text(node)}({', '.join(operands)})"
        yield f"return {_tuple([node.name for node in (*self._group.results, *self._written())])}"

    def _argument(self, value: Any) -> str:
        text = argument_text(value, lambda node: node.name if _holds_tensors(node) else self._size(value_of(node)))
        return re.sub(r"\btorch\.(float\d+|bfloat16)\b", r"types.\1", text)

    def _size(self, extent: Any) -> str:
        if not isinstance(extent, (int, torch.SymInt)):
            return repr(extent)
        expression = size_expr(extent)
        for symbol in sorted(expression.free_symbols, key=str):
            self._sizes.setdefault(symbol, sympy.Symbol(f"n{len(self._sizes)}"))
        return str(expression.subs(self._sizes))

    def _shape(self, node: fx.Node) -> str:
        return _tuple([self._size(extent) for extent in value_of(node).shape])

    def _recorded_sizes(self, model_graph: ModelGraph) -> dict[sympy.Symbol, int]:
        hints: dict[sympy.Symbol, int] = {}
        for node in model_graph.graph.nodes:
            value = value_of(node) if node.op == "placeholder" else None
            for extent in (value, *getattr(value, "shape", ())):
                if isinstance(extent, torch.SymInt):
                    hints.setdefault(extent.node.expr, extent.node.hint)
        for node, given in self._kinds.caches():
            self._set_step_sizes(node, given, hints)
        return hints

    def _set_step_sizes(self, node: fx.Node, given: Mapping[str, Any], hints: dict[sympy.Symbol, int]) -> None:
        def set_size(argument: str, dim: int, value: int) -> None:
            extent = value_of(given[argument]).shape[dim]
            if isinstance(extent, torch.SymInt) and extent.node.expr.is_Symbol:
                hints[extent.node.expr] = value

        set_size("key_cache", 0, _STEP_SIZES["blocks"])
        set_size("key_cache", 3, _STEP_SIZES["block_size"])
        if node.target == paged_attention.overload:
            set_size("query_start_loc", 0, _STEP_SIZES["sequences"] + 1)
            set_size("block_tables", 1, _STEP_SIZES["table_width"])
            set_size("block_tables", 0, _STEP_SIZES["sequences"])
            set_size("seq_lens", 0, _STEP_SIZES["sequences"])

    def _input(self, leaf: fx.Node) -> str:
        value = value_of(leaf)
        dtype = str(value.dtype).removeprefix("torch.")
        kind, limit = self._kinds.kind(leaf)
        return f'Input("{leaf.name}", "{dtype}", {self._shape(leaf)}, "{kind}", {limit})'

    def _operand(self, source: fx.Node | PackedWeight) -> str:
        if isinstance(source, fx.Node):
            return repr(source.name)
        parts = tuple(part.name for part in source.parts)
        return f"Packed({parts!r}, {source.panel_format!r}, {source.half_distance}, {source.is_transposed})"

    def _result(self, node: fx.Node) -> str:
        dtype = str(value_of(node).dtype).removeprefix("torch.")
        return f'Result("{node.name}", "{dtype}", {self._shape(node)})'

    def _written(self) -> list[fx.Node]:
        operands = zip(self._group.spec.buffers, self._group.sources, strict=False)
        return [source for buffer, source in operands if buffer.is_written and isinstance(source, fx.Node)]

    def _rounds_to_integers(self) -> bool:
        """Whether integers come out that are floats rounded: on the edge of two they may be either."""
        is_quantized = any("quantize" in str(node.target) for node in self._group.nodes)
        return is_quantized or any(value_of(cache).dtype == torch.int8 for cache in self._written())

    def _num_operations(self) -> str:
        """Twice the multiplications of a product, as an expression of the sizes."""
        spec = self._group.spec
        if isinstance(spec, MatmulSpec):
            width = 1 if spec.half_distance == HALF_PANEL else 2
            return str(2 * spec.row.extent * spec.reduced * spec.stores[0].column.extent * width)
        if isinstance(spec, AttentionSpec):
            return str(2 * product(spec.extents) * spec.num_heads * (spec.head_dim + spec.value_head_dim))
        return "0"


def _holds_tensors(node: fx.Node) -> bool:
    """Whether a node is part of the definition: sizes are written as numbers where they are used."""
    return not isinstance(value_of(node), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def _tuple(parts: list[str]) -> str:
    return f"({', '.join(parts)},)" if parts else "()"


_TEMPLATE = '''"""{name}: a kernel of infercomp. Run it: python {name}.py

Builds {name}.cpp beside it, edited or not; ends with 1 if a result is wrong. It was made from
{origin}
"""

import operator  # noqa: F401
import sys

import torch

import infercomp.codegen.ops  # noqa: F401  (registers torch.ops.infercomp)
from infercomp.codegen.weight_panels import PanelFormat  # noqa: F401
from infercomp.kernel_check import Input, KernelCheck, Packed, Result  # noqa: F401

# Sizes as recorded when compiling; change them to check and time others.
{sizes}

CHECK = KernelCheck(
    name="{name}",
    sizes={used},
    inputs=(
{inputs}    ),
    operands=(
{operands}    ),
    results=(
{results}    ),
    written={written!r},
    tables={tables!r},
    num_operations={operations},
    rounds_to_integers={rounds},
    instruction_set="{instruction_set}",
)


def definition({arguments}):
    """What the kernel computes; ``types`` holds the floating types, all of them float64 for the reference."""
{statements}


if __name__ == "__main__":
    sys.exit(CHECK.main(__file__, definition))
'''
