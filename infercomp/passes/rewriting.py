"""Rules as data: a pattern and a replacement, both ordinary functions, and one engine for them.

A pattern is written with the operators and functions below and traced into a small tree. The
engine matches it against the graph, trying both orders of commutative ops and looking through
casts between floating dtypes (in float64 they are identities; the replacement rounds once). Where
most of a pattern fits and one op does not, the difference is kept as a near miss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..codegen.model_graph import Emitter, ModelGraph, value_of
from .graph_pass import PassContext

aten = torch.ops.aten
Bindings = dict[str, Any]


@dataclass(frozen=True)
class Pattern:
    """A node of a traced pattern: ``name`` alone is a wildcard, ``targets`` with ``operands`` a call."""

    name: str
    targets: tuple[Any, ...] = ()
    operands: tuple[Any, ...] = ()
    commutative: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __mul__(self, other: Any) -> Pattern:
        return Pattern("mul", (aten.mul.Tensor, aten.mul.Scalar), (self, other), commutative=True)

    def __add__(self, other: Any) -> Pattern:
        return Pattern("add", (aten.add.Tensor, aten.add.Scalar), (self, other), commutative=True)

    def __truediv__(self, other: Any) -> Pattern:
        return Pattern("div", (aten.div.Tensor, aten.div.Scalar), (self, other))

    def __neg__(self) -> Pattern:
        return Pattern("neg", (aten.neg.default,), (self,))

    __rmul__ = __mul__
    __radd__ = __add__


def square(x: Pattern) -> Pattern:
    return Pattern("pow", (aten.pow.Tensor_Scalar,), (x, 2))


def rsqrt(x: Pattern) -> Pattern:
    return Pattern("rsqrt", (aten.rsqrt.default,), (x,))


def sqrt(x: Pattern) -> Pattern:
    return Pattern("sqrt", (aten.sqrt.default,), (x,))


def mean_of_last(x: Pattern) -> Pattern:
    return Pattern("mean", (aten.mean.dim,), (x, [-1], True))


def power(x: Pattern, exponent: float) -> Pattern:
    return Pattern("pow", (aten.pow.Tensor_Scalar,), (x, exponent))


def slice_of(x: Pattern, dim: Any, start: Any, end: Any, step: Any = 1) -> Pattern:
    return Pattern("slice", (aten.slice.Tensor,), (x, dim, start, end, step))


def concatenate(parts: list[Pattern], dim: Any) -> Pattern:
    return Pattern("cat", (aten.cat.default,), (parts, dim))


def stack(parts: list[Pattern], dim: Any) -> Pattern:
    return Pattern("stack", (aten.stack.default,), (parts, dim))


def reshape(x: Pattern, shape: Any) -> Pattern:
    return Pattern("reshape", (aten.reshape.default,), (x, shape))


def call(target: Any, *operands: Any) -> Pattern:
    return Pattern(str(target), (getattr(target, "overload", target),), operands)


@dataclass(frozen=True)
class Rule:
    """``pattern(**wildcards)`` is looked for, ``replacement(emit, **bindings)`` put in its place.

    ``guard(bindings, root)`` returns None to accept or the reason to refuse; a match that fits at
    least ``near_miss_at`` ops before it fails is remembered as a near miss.
    """

    name: str
    pattern: Callable[..., Pattern]
    replacement: Callable[..., fx.Node]
    guard: Callable[[Bindings, fx.Node], str | None] = lambda bindings, root: None
    near_miss_at: int = 3

    def traced(self) -> Pattern:
        code = self.pattern.__code__
        return self.pattern(**{name: Pattern(name) for name in code.co_varnames[: code.co_argcount]})


_CASTS = (aten._to_copy.default, aten.to.dtype)


def without_casts(node: Any) -> Any:
    """The node behind casts from one floating dtype to another."""
    while isinstance(node, fx.Node) and node.target in _CASTS:
        source = node.args[0]
        if not (value_of(source).is_floating_point() and value_of(node).is_floating_point()):
            break
        node = source
    return node


class _Matcher:
    def __init__(self) -> None:
        self.num_matched = 0
        self.best = 0
        self.reason = ""
        self._reason_at = -1

    def match(self, pattern: Any, candidate: Any, bindings: Bindings) -> Iterator[Bindings]:
        """Every way to bind the pattern's wildcards to the graph at ``candidate``."""
        if isinstance(pattern, (list, tuple)):
            yield from self._match_sequence(pattern, candidate, bindings)
        elif not isinstance(pattern, Pattern):
            if type(candidate) is not fx.Node and candidate == pattern:
                yield bindings
            else:
                self._miss(f"expected {pattern}, found {candidate}")
        elif not pattern.targets:
            yield from self._match_wildcard(pattern, candidate, bindings)
        else:
            yield from self._match_call(pattern, without_casts(candidate), bindings)

    def _match_wildcard(self, pattern: Pattern, candidate: Any, bindings: Bindings) -> Iterator[Bindings]:
        candidate = without_casts(candidate)
        bound = bindings.get(pattern.name, candidate)
        if bound is candidate or (not isinstance(bound, fx.Node) and bound == candidate):
            yield {**bindings, pattern.name: candidate}
        else:
            self._miss(f"{pattern.name} is {_describe(bound)} in one place and {_describe(candidate)} in another")

    def _match_sequence(self, patterns: Any, candidate: Any, bindings: Bindings) -> Iterator[Bindings]:
        if not isinstance(candidate, (list, tuple)) or len(candidate) != len(patterns):
            self._miss(f"expected {len(patterns)} operands, found {candidate}")
            return
        yield from self._match_operands(list(patterns), list(candidate), bindings)

    def _match_operands(self, patterns: list[Any], candidates: list[Any], bindings: Bindings) -> Iterator[Bindings]:
        if not patterns:
            yield bindings
            return
        for bound in self.match(patterns[0], candidates[0], bindings):
            yield from self._match_operands(patterns[1:], candidates[1:], bound)

    def _match_call(self, pattern: Pattern, node: Any, bindings: Bindings) -> Iterator[Bindings]:
        if not isinstance(node, fx.Node) or node.target not in pattern.targets:
            self._miss(f"expected {pattern.name}, found {_describe(node)}")
            return
        self.num_matched += 1
        self.best = max(self.best, self.num_matched)
        operands = _operands(node, len(pattern.operands), pattern.options)
        if operands is None:
            self._miss(f"{node.name} has other operands than {pattern.name} in the pattern")
        else:
            yield from self._match_operands(list(pattern.operands), operands, bindings)
            if pattern.commutative:
                yield from self._match_operands(list(pattern.operands), operands[::-1], bindings)
        self.num_matched -= 1

    def _miss(self, reason: str) -> None:
        # Of equally deep attempts the first has the operands in the order of the pattern.
        if self.num_matched > self._reason_at:
            self.reason, self._reason_at = reason, self.num_matched


def _operands(node: fx.Node, count: int, options: dict[str, Any]) -> list[Any] | None:
    """Positional operands with the schema's defaults filled in; None if a further one is neither as in
    ``options`` nor at its default."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    values = [
        node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        for i, argument in enumerate(schema)
    ]
    for argument, value in zip(schema[count:], values[count:], strict=True):
        if argument.name != "dtype" and value != options.get(argument.name, argument.default_value):
            return None
    return values[:count]


def _describe(value: Any) -> str:
    if not isinstance(value, fx.Node):
        return repr(value)
    return (
        value.name if value.op == "placeholder" else f"{getattr(value.target, '__name__', value.target)} ({value.name})"
    )


def apply_rules(rules: tuple[Rule, ...], model_graph: ModelGraph, context: PassContext) -> None:
    """Apply the first rule that fits at every node, outermost (latest) nodes first."""
    traced = [(rule, rule.traced()) for rule in rules]
    hidden: set[fx.Node] = set()
    for root in reversed(list(model_graph.graph.nodes)):
        if root._erased or root.op != "call_function" or not root.users or root in hidden:
            continue
        misses: list[str] = []
        for rule, pattern in traced:
            reason = _try_rule(rule, pattern, root, model_graph, context, hidden)
            if reason is None:
                misses = []
                break
            if reason:
                misses.append(f"{rule.name}: {reason}")
        if misses:
            context.near_miss(root, misses[0])
    model_graph.eliminate_dead_code()


def _try_rule(
    rule: Rule, pattern: Pattern, root: fx.Node, model_graph: ModelGraph, context: PassContext, hidden: set[fx.Node]
) -> str | None:
    """None if the rule applied, or the user switched the match off, else the near miss's reason or ''.

    The interior of a match that was switched off is added to ``hidden``: it must not match by itself,
    so that indices are the same as where the match is applied.
    """
    if root.target not in pattern.targets:
        return ""
    matcher = _Matcher()
    refusal = ""
    for bindings in matcher.match(pattern, root, {}):
        reason = rule.guard(bindings, root)
        if reason is not None:
            refusal = reason
            continue
        site = context.claim(root)
        if site is None:
            hidden |= _interior(root, bindings)
            return None
        with model_graph.inserting_before(root) as emit:
            new = _replacement(rule, emit, bindings, root)
        context.replace(site, root, new)
        erase_dead(model_graph, root)
        return None
    if refusal:
        return refusal
    return matcher.reason if matcher.best >= rule.near_miss_at else ""


def _replacement(rule: Rule, emit: Emitter, bindings: Bindings, root: fx.Node) -> fx.Node:
    """The new node in root's dtype. A rule that rounds to a narrower dtype than root has, where root's
    users need it whole, is fed wider operands instead."""
    new = rule.replacement(emit, **bindings)
    narrow, wide = value_of(new).dtype, value_of(root).dtype
    if narrow.itemsize < wide.itemsize and not all(_is_cast_to(user, narrow) for user in root.users):
        widened = {name: _widened(emit, bound, root) for name, bound in bindings.items()}
        new = rule.replacement(emit, **widened)
    return cast_like(emit, new, root)


def _is_cast_to(node: fx.Node, dtype: torch.dtype) -> bool:
    return node.target in _CASTS and value_of(node).dtype == dtype


def _widened(emit: Emitter, bound: Any, like: fx.Node) -> Any:
    if not isinstance(bound, fx.Node) or not value_of(bound).is_floating_point():
        return bound
    return cast_like(emit, bound, like) if value_of(bound).dtype.itemsize < value_of(like).dtype.itemsize else bound


def _interior(root: fx.Node, bindings: Bindings) -> set[fx.Node]:
    """The nodes that would be dead if root were replaced: those between root and what the wildcards bind."""
    bound = [value for value in bindings.values() if isinstance(value, fx.Node)]
    dead, pending = {root}, [root]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source.op == "call_function" and source not in bound and dead.issuperset(source.users):
                dead.add(source)
                pending.append(source)
    return dead


def erase_dead(model_graph: ModelGraph, node: fx.Node) -> None:
    """Erase a node without users, and what only it used: a matched interior must not match again."""
    if node.users or node.op != "call_function" or node._erased:
        return
    sources = node.all_input_nodes
    model_graph.graph.erase_node(node)
    for source in sources:
        erase_dead(model_graph, source)


def cast_like(emit: Emitter, node: fx.Node, like: fx.Node) -> fx.Node:
    """``node`` in the dtype of ``like``."""
    dtype = value_of(like).dtype
    return node if value_of(node).dtype == dtype else emit(aten._to_copy.default, node, dtype=dtype)
