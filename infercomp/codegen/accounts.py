"""What a plan says about itself: which calls have a kernel, which have none and why, and which fusions failed."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator

from torch import fx

from ..runtime.errors import UnsupportedError
from ..runtime.program import KernelUse, OpExecution, TakenApart
from .config import CodegenConfig
from .grouping import Plan
from .model_graph import ModelGraph, source_line
from .ops import definition_of
from .overrides import read_overrides
from .regions import is_inlined
from .specs import spec_name


def require_kernels(plan: Plan) -> None:
    """Raise UnsupportedError for the first call that would run as its definition or ATen op.

    Views, constants, sizes and what is done once to weights are no calls of a step.
    """
    node = next((node for node in plan.refused if node.target is not operator.getitem), None)
    if node is None:
        return
    others = sum(other.target is not operator.getitem for other in plan.refused) - 1
    more = f", and {others} more calls have none" if others else ""
    raise UnsupportedError(
        f"strict: no kernel takes {op_name(node)} ({node.name}): {plan.refused[node]}{more}",
        where=source_line(node),
        remedy='leave strict off to run it by its definition, or use codegen="reference"; infercomp explain lists all',
        field="strict",
    )


def executions(model_graph: ModelGraph, plan: Plan, language: str) -> Iterator[OpExecution]:
    """How each op is executed, counted, its kernels being in ``language``; views are free and not listed."""
    native = {node for group in plan.groups for node in group.nodes}
    entries: Counter[tuple[str, str, str | None]] = Counter()
    for node in model_graph.graph.nodes:
        if node.op != "call_function":
            continue
        if node in native:
            entries[op_name(node), language, None] += 1
        elif node in plan.refused:
            ours = definition_of(node.target) is not None
            entries[op_name(node), "definition" if ours else "aten", plan.refused[node]] += 1
        elif not is_inlined(node):
            entries[op_name(node), "definition" if definition_of(node.target) else "aten", None] += 1
    for (name, how, reason), calls in sorted(entries.items(), key=str):
        yield OpExecution(name, how, calls, reason)


def op_name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.replace("::", ".") if schema else getattr(node.target, "__name__", str(node.target))


def kernel_uses(plan: Plan, config: CodegenConfig) -> tuple[KernelUse, ...]:
    """The kernels in the order of their first calls."""
    overrides = read_overrides(config.kernel_overrides)
    names = {id(spec): spec_name(spec) for spec in {id(group.spec): group.spec for group in plan.groups}.values()}
    calls = Counter(names[id(group.spec)] for group in plan.groups)
    ops = {names[id(group.spec)]: _ops_of(group.nodes) for group in reversed(plan.groups)}
    return tuple(KernelUse(name, ops[name], count, name in overrides) for name, count in calls.items())


def groups_taken_apart(plan: Plan) -> tuple[TakenApart, ...]:
    """Alike groups, those of different layers for instance, are counted."""
    alike: dict[tuple[tuple[str, ...], str], tuple[str | None, int]] = {}
    for nodes, reason in plan.taken_apart:
        key = (_ops_of(nodes), reason)
        where, count = alike.get(key, (next(filter(None, map(source_line, nodes)), None), 0))
        alike[key] = (where, count + 1)
    return tuple(TakenApart(ops, reason, where, count) for (ops, reason), (where, count) in alike.items())


def _ops_of(nodes: tuple[fx.Node, ...]) -> tuple[str, ...]:
    return tuple(op_name(node) for node in nodes if node.target is not operator.getitem)
