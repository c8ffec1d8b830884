"""From a linear and the calls fused behind it to a ``MatmulSpec``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from .indexing import LoopVariable, affine
from .lazy_tensor import Index, LazyTensor, Refused
from .model_graph import value_of
from .ops import (
    clustered_weight_linear,
    group_linear,
    group_weight_linear,
    int8_linear,
    int8_weight_linear,
    linear,
    sparse_group_weight_linear,
    sparse_int8_linear,
    sparse_weight_linear,
)
from .regions import (
    PackedWeight,
    Region,
    Source,
    buffers_of,
    is_inlined,
    leading_shape,
    named_arguments,
    renamed,
    row_variable,
    store_of,
)
from .scalar import Scalar, accumulator, binary, cast, walk
from .specs import MatmulSpec, WeightLayout
from .weight_panels import BF16, F32, INT8, PanelFormat, Zeros, clustered, grouped, sparse, sparse_grouped

_INTEGER_LINEARS = (int8_linear, group_linear, int8_weight_linear, group_weight_linear)
_SPARSE_LINEARS = (sparse_weight_linear, sparse_int8_linear, sparse_group_weight_linear)
LINEARS = frozenset(op.overload for op in (linear, *_INTEGER_LINEARS, clustered_weight_linear, *_SPARSE_LINEARS))
_FLOATS = {torch.float32: F32, torch.bfloat16: BF16}
HALF_PANEL = 16


class NotRowMajor(Refused):
    """A left operand whose rows do not lie one after the other: ``node`` must be stored first."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(f"the rows of {node.name} are not contiguous")
        self.node = node


@dataclass(frozen=True)
class _Product:
    """The operands of one linear, whatever its format; ``finish`` turns the accumulator into the result."""

    node: fx.Node
    rows: fx.Node
    panel_format: PanelFormat
    parts: tuple[fx.Node, ...]
    sums: fx.Node | None = None
    scale: fx.Node | None = None
    weight_scale: fx.Node | None = None
    bias: fx.Node | None = None
    is_transposed: bool = False


def linear_of(nodes: Sequence[fx.Node]) -> fx.Node | None:
    """The one linear of a group, or None."""
    linears = [node for node in nodes if node.target in LINEARS]
    if len(linears) > 1:
        raise Refused("two matrix products in one kernel")
    return linears[0] if linears else None


def build_matmul(region: Region, node: fx.Node, results: Sequence[fx.Node], *, packs_floats: bool) -> MatmulSpec:
    """The product of ``node`` with the group's other calls as its epilogue, storing ``results``.

    C++ kernels read float weights where they are unless ``packs_floats``, and other formats packed; Triton
    kernels read all weights where they are.
    """
    product = _product(node)
    leading = leading_shape(region, node)
    row, row_index = row_variable(leading)
    reduced = value_of(product.rows).shape[-1]
    stride, offset = _left_operand(region, product.rows, row)
    weight = _weight(region, product, packs_floats)
    for i, operand in enumerate(weight):
        if region.source_name(operand) != f"b{1 + i}":
            raise Refused("its weight is also its left operand")
    if product.sums is not None and isinstance(weight[0], PackedWeight):
        _require_contiguous_sums(region, product.sums, row)
    domain_leading = leading_shape(region, results[-1])
    region.bind(node, _finished(region, product, row_index))
    stores = [store_of(region, result, f"out{i}", domain_leading, row_index) for i, result in enumerate(results)]
    distance = _half_distance([store.value for store in stores], stores[0].column)
    if product.panel_format.outlier_room is not None and distance % HALF_PANEL:
        raise Refused("the halves of its panels are not 16 rows of one table")
    if isinstance(weight[0], PackedWeight):
        region.sources[1] = replace(weight[0], half_distance=distance)
    return MatmulSpec(
        buffers_of(region, results),
        product.panel_format,
        _layout(weight[0], product),
        value_of(product.rows).dtype,
        row,
        int(reduced),
        stride,
        offset,
        distance,
        renamed(region, stores),
    )


def _weight(region: Region, product: _Product, packs_floats: bool) -> tuple[Source, ...]:
    """What the kernel reads as its weight: panels, or the weight's own tensors."""
    is_float = product.panel_format in (F32, BF16)
    if region.language == "cpp" and (packs_floats or not is_float):
        return (PackedWeight(product.parts, product.panel_format, HALF_PANEL, product.is_transposed),)
    if product.panel_format.outlier_room is not None:
        raise Refused("no Triton kernel looks weights up in a table")
    if product.panel_format.group is not None and product.sums is not None:
        raise Refused("no Triton kernel multiplies int8 rows with weights in groups")
    for part in product.parts:
        if is_inlined(part):
            raise Refused(f"its weight {part.name} is a view that is stored nowhere")
    return product.parts


def _layout(weight: Source, product: _Product) -> WeightLayout:
    if isinstance(weight, PackedWeight):
        return "panels"
    return "columns" if product.is_transposed else "rows"


def _product(node: fx.Node) -> _Product:
    given = named_arguments(node)
    dtype = value_of(node.args[0]).dtype
    if node.target == linear.overload:
        return _float_product(node, given, dtype)
    if node.target == clustered_weight_linear.overload:
        return _clustered_product(node, given, dtype)
    if node.target in [op.overload for op in _SPARSE_LINEARS]:
        return _sparse_product(node, given, dtype)
    zero = given.get("weight_zero")
    if node.target in (int8_linear.overload, int8_weight_linear.overload):
        panel_format, parts = INT8, (given["weight"],)
    else:
        panel_format = grouped(given["bits"], given["group_size"], _kind_of(zero))
        parts = (given["weight"], given["weight_scale"], *([] if zero is None else [zero]))
    is_int8 = panel_format == INT8
    return _Product(
        node,
        node.args[0],  # type: ignore[arg-type]
        panel_format,
        parts,
        given.get("sums"),
        given.get("scale"),
        given["weight_scale"] if is_int8 else None,
        given["bias"],
    )


def _kind_of(zero: fx.Node | None) -> Zeros:
    if zero is None:
        return "middle"
    return "points" if value_of(zero).dtype == torch.uint8 else "values"


def _float_product(node: fx.Node, given: dict[str, fx.Node], dtype: torch.dtype) -> _Product:
    if dtype not in _FLOATS or value_of(given["weight"]).dtype != dtype:
        raise Refused(f"no panels for {dtype} rows and {value_of(given['weight']).dtype} weights")
    return _Product(
        node, given["input"], _FLOATS[dtype], (given["weight"],), bias=given["bias"], is_transposed=given["transposed"]
    )


def _clustered_product(node: fx.Node, given: dict[str, Any], dtype: torch.dtype) -> _Product:
    if dtype not in (torch.float32, torch.bfloat16):
        raise Refused(f"no panels for {dtype} rows and weights in a table")
    names = ("weight", "table", "outlier_counts", "outlier_columns", "outlier_excess")
    parts = tuple(given[name] for name in names)
    return _Product(node, given["input"], clustered(given["outlier_room"]), parts, bias=given["bias"])


def _sparse_product(node: fx.Node, given: dict[str, Any], dtype: torch.dtype) -> _Product:
    if node.target == sparse_group_weight_linear.overload:
        if dtype not in _FLOATS:
            raise Refused(f"no panels for {dtype} rows and two of four codes")
        zero = given["weight_zero"]
        panel_format = sparse_grouped(given["bits"], given["group_size"], _kind_of(zero))
        parts = (
            given["weight_values"],
            given["weight_indices"],
            given["weight_scale"],
            *([] if zero is None else [zero]),
        )
        return _Product(node, given["input"], panel_format, parts, bias=given["bias"])
    values = value_of(given["weight_values"]).dtype
    if dtype not in (*_FLOATS, torch.int8) or values not in (*_FLOATS, torch.int8):
        raise Refused(f"no panels for {dtype} rows and two of four {values} weights")
    return _Product(
        node,
        node.args[0],  # type: ignore[arg-type]
        sparse(_FLOATS.get(values, INT8)),
        (given["weight_values"], given["weight_indices"]),
        given.get("sums"),
        given.get("scale"),
        given["weight_scale"],
        given["bias"],
    )


def _left_operand(region: Region, node: fx.Node, row: LoopVariable) -> tuple[sympy.Expr, sympy.Expr]:
    """The stride and offset of the rows that are multiplied; ``b0`` is their buffer."""
    tensor = region.tensor(node)
    channel = LoopVariable("k", tensor.shape[-1])
    _, row_index = row_variable(tensor.shape[:-1])
    element = tensor.at((*row_index, channel if tensor.shape[-1] != 1 else sympy.Integer(0)))
    found = affine(element.payload[1], (channel, row)) if element.op == "load" else None  # type: ignore[index]
    if found is None or element.payload[2] != tensor.dtype:  # type: ignore[index]
        raise NotRowMajor(node)
    offset, (step, stride) = found
    is_plain = not any(isinstance(part, sympy.Function) for part in sympy.preorder_traversal(element.payload[1]))  # type: ignore[index]
    if (step != 1 and tensor.shape[-1] != 1) or element.payload[0] != "b0" or not is_plain:  # type: ignore[index]
        raise NotRowMajor(node)
    return stride, offset


def _require_contiguous_sums(region: Region, node: fx.Node, row: LoopVariable) -> None:
    tensor = region.tensor(node)
    group = LoopVariable("k", tensor.shape[-1])
    _, row_index = row_variable(tensor.shape[:-1])
    element = tensor.at((*row_index, group if tensor.shape[-1] != 1 else sympy.Integer(0)))
    expected = sympy.expand(
        (row if row.extent != 1 else 0) * tensor.shape[-1] + (group if tensor.shape[-1] != 1 else 0)
    )
    if element.op != "load" or element.payload[0] != "b2" or element.payload[1] != expected:  # type: ignore[index]
        raise NotRowMajor(node)


def _finished(region: Region, product: _Product, row_index: Index) -> LazyTensor:
    """The linear's result as an expression of the accumulator: scales, bias, one rounding."""
    value = value_of(product.node)
    is_integer = product.panel_format.bits == 8 and product.sums is not None
    accumulated = torch.int32 if is_integer else torch.float32

    def compute(index: Index) -> Scalar:
        if tuple(index[:-1]) != tuple(row_index):
            raise Refused("the epilogue reads another row of the product")
        offset = _column_offset(index[-1])
        result = cast(accumulator(offset, accumulated), torch.float32)
        for factor, at in ((product.scale, (*index[:-1], sympy.Integer(0))), (product.weight_scale, index[-1:])):
            if factor is not None:
                result = binary("mul", result, cast(region.tensor(factor).at(at), torch.float32))
        if product.bias is not None:
            result = binary("add", result, cast(region.tensor(product.bias).at(index[-1:]), torch.float32))
        return cast(result, value.dtype)

    return LazyTensor(region.shape(product.node), value.dtype, compute)


def _column_offset(position: sympy.Expr) -> sympy.Expr:
    """How far right of the column being written a column of the product lies."""
    columns = [s for s in position.free_symbols if isinstance(s, LoopVariable) and s.name == "c"]
    offset = sympy.expand(position - (columns[0] if columns else 0))
    if not offset.is_Integer:
        raise Refused("the epilogue reads other columns of the product")
    return offset


def _half_distance(values: Sequence[Scalar], column: LoopVariable) -> int:
    """16 where only the written column is read, else how far the second one is."""
    offsets = {int(node.payload) for value in values for node in walk(value) if node.op == "accumulator"}  # type: ignore[call-overload]
    if offsets == {0}:
        return HALF_PANEL
    if len(offsets) == 2 and min(offsets) == 0 and max(offsets) == column.extent:
        return max(offsets)
    raise Refused(f"the epilogue reads columns at distances {sorted(offsets)}")
