"""Verification: the graph's structure after every pass, its numbers in float64 on request.

Numerics: the graph before and after a pass are run on the same real inputs with every floating
dtype widened to float64, casts inside the graph included. Rounding then vanishes, and what is left
above the class's bound is an error of algebra, blamed on the first site where the values part.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..codegen.model_graph import ModelGraph, same_shape, value_of
from ..runtime.errors import VerificationError
from .graph_pass import NumericClass, PassContext


@dataclass(frozen=True)
class Reference:
    """Stands for another step's value inside a step's arguments."""

    name: str


@dataclass(frozen=True)
class Step:
    """One node of a graph as it was when the tape was taken."""

    name: str
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def tape_of(model_graph: ModelGraph) -> list[Step]:
    """The graph's calls as a list that later rewrites do not touch."""

    def frozen(argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda node: Reference(node.name))

    return [
        Step(node.name, node.op, node.target, frozen(node.args), dict(frozen(node.kwargs)))
        for node in model_graph.graph.nodes
    ]


def check_structure(model_graph: ModelGraph, outputs_before: Sequence[Any] | None, pass_name: str) -> None:
    """Lint the graph, check that every node has a value and that the outputs kept shape and dtype."""
    try:
        model_graph.graph.lint()
    except RuntimeError as error:
        raise VerificationError(
            f"{pass_name} left a graph that is not well formed: {error}", pass_name=pass_name
        ) from error
    for node in model_graph.graph.nodes:
        if node.op != "output" and "val" not in node.meta:
            raise VerificationError(
                f"{pass_name} left {node.name} without a value", pass_name=pass_name, site=node.name
            )
    if outputs_before is None:
        return
    outputs_after = output_values(model_graph)
    if len(outputs_before) != len(outputs_after):
        raise VerificationError(
            f"{pass_name} changed the number of outputs from {len(outputs_before)} to {len(outputs_after)}",
            pass_name=pass_name,
        )
    for old, new in zip(outputs_before, outputs_after, strict=True):
        if isinstance(old, torch.Tensor) and not _is_alike(old, new):
            raise VerificationError(
                f"{pass_name} changed an output from {_kind(old)} to {_kind(new)}", pass_name=pass_name
            )


def _is_alike(old: torch.Tensor, new: Any) -> bool:
    if not isinstance(new, torch.Tensor):
        return False
    return old.dtype == new.dtype and same_shape(tuple(old.shape), tuple(new.shape))


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def output_values(model_graph: ModelGraph) -> list[Any]:
    return [value_of(argument) for argument in model_graph.output_node().args[0]]


def evaluate(
    tape: Sequence[Step],
    values: Mapping[str, Any],
    keep: frozenset[str] = frozenset(),
    *,
    is_widened: bool = True,
    forced: Mapping[str, Any] | None = None,
) -> tuple[list[Any], dict[str, Any]]:
    """Run a tape, with all floating dtypes widened to float64 or as it is; its outputs and the kept values.

    What follows a step that is ``forced`` gets that value instead of the step's own, which may still be kept.
    """
    widen, argument_of = (_widen, _widened_argument) if is_widened else (lambda value: value, _argument)
    last_use: dict[str, int] = {}
    for position, step in enumerate(tape):
        fx.node.map_aggregate((step.args, step.kwargs), lambda a, p=position: _mark(last_use, a, p))
    forced = forced or {}
    environment: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    expiring: dict[int, list[str]] = {}
    for name, position in last_use.items():
        expiring.setdefault(position, []).append(name)
    for position, step in enumerate(tape):
        args, kwargs = fx.node.map_aggregate((step.args, step.kwargs), lambda a: argument_of(environment, a))
        if step.op == "output":
            return list(args[0]), kept
        result = widen(values[step.name] if step.op == "placeholder" else step.target(*args, **kwargs))
        environment[step.name] = forced.get(step.name, result)
        if step.name in keep:
            kept[step.name] = result
        for name in expiring.get(position, ()):
            environment.pop(name, None)
    raise AssertionError("a graph ends with its output")


def _mark(last_use: dict[str, int], argument: Any, position: int) -> Any:
    if isinstance(argument, Reference):
        last_use[argument.name] = position
    return argument


def _argument(environment: Mapping[str, Any], argument: Any) -> Any:
    return environment[argument.name] if isinstance(argument, Reference) else argument


def _widened_argument(environment: Mapping[str, Any], argument: Any) -> Any:
    if isinstance(argument, torch.dtype) and argument.is_floating_point:
        return torch.float64
    return _argument(environment, argument)


def _widen(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(_widen(element) for element in value)
    return value


def relative_error(reference: torch.Tensor, candidate: torch.Tensor, smallest_scale: float = 1.0) -> float:
    """max |candidate - reference| / max(smallest_scale, max |reference|), equal infinities and NaNs left out."""
    if reference.shape != candidate.shape:
        return float("inf")
    if not reference.is_floating_point():
        return 0.0 if torch.equal(reference, candidate) else float("inf")
    same = (reference == candidate) | (reference.isnan() & candidate.isnan())
    difference = torch.where(same, 0.0, (candidate - reference).abs())
    finite = reference[reference.isfinite()].abs()
    scale = max(smallest_scale, float(finite.max())) if finite.numel() else smallest_scale
    largest = float(difference.max()) if difference.numel() else 0.0
    worst = largest / scale if scale else float("inf") if largest else 0.0
    return float("inf") if worst != worst else worst


def measure(
    before: Sequence[Step],
    weights_before: Mapping[str, torch.Tensor],
    inputs_before: Mapping[str, Any],
    model_graph: ModelGraph,
    inputs_after: Mapping[str, Any],
    context: PassContext,
    numeric_class: NumericClass,
) -> float:
    """The pass's largest error, over outputs and sites.

    ``weights_before`` are those of the graph before the pass, which may have replaced some.
    Raises VerificationError, naming the pass and the first site that parts, above the class's bound.
    """
    replaced = {old: (new, site) for site in context.sites for old, new in site.replaced.items()}
    # What stands in a place at the end: a pass may replace its own replacements, or only a node's weights.
    for old, (new, site) in replaced.items():
        while new in replaced and new != old:
            new = replaced[new][0]
        replaced[old] = (new, site)
    new_names = frozenset(new for new, _ in replaced.values())
    run = functools.partial(evaluate, is_widened=numeric_class.is_widened)
    with torch.no_grad():
        outputs, old_values = run(before, {**weights_before, **_copied(inputs_before)}, frozenset(replaced))
        forced = {replaced[old][0]: value for old, value in old_values.items()} if numeric_class.is_local else None
        values_after = {**model_graph.weights, **_copied(inputs_after)}
        new_outputs, new_values = run(tape_of(model_graph), values_after, new_names, forced=forced)
    smallest_scale = 0.0 if numeric_class.is_local else 1.0
    worst = 0.0
    for old, value in old_values.items():
        new, site = replaced[old]
        if new in new_values:
            error = _error(value, new_values[new], smallest_scale)
            if error > numeric_class.bound:
                _fail(context.name, f"{context.name}#{site.index}", site.where, error, numeric_class)
            worst = max(worst, error)
    error = max((_error(a, b, smallest_scale) for a, b in zip(outputs, new_outputs, strict=True)), default=0.0)
    if error > numeric_class.bound:
        _fail(context.name, None, None, error, numeric_class)
    return max(worst, error)


def _copied(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs that a run may write to, a cache for instance, without changing the caller's."""
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def _error(old: Any, new: Any, smallest_scale: float) -> float:
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        return relative_error(old, new, smallest_scale)
    return 0.0 if old == new else float("inf")


def _fail(pass_name: str, site: str | None, where: str | None, error: float, numeric_class: NumericClass) -> None:
    place = f"site {site}" if site else "the outputs"
    raise VerificationError(
        f"{pass_name} is declared {numeric_class.name} (bound {numeric_class.bound:g}) but moved {place} by {error:.3g}"
        f"{' in float64' if numeric_class.is_widened else ''}",
        pass_name=pass_name,
        site=site,
        where=where,
        remedy=f'switch it off with options={{"disable": ["{site or pass_name}"]}} and report it',
    )
