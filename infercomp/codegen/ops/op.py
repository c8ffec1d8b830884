"""How an op of the vocabulary is declared: a schema and one plain-torch body.

The body is the op's semantics, its eager fallback and the oracle that every kernel is tested
against. Its fake (meta) function is a twin that says the shape and dtype only. Registration goes
through ``torch.library``, so the ops live in FX graphs, trace under fake tensors and serialise by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

NAMESPACE = "infercomp"
_library = torch.library.Library(NAMESPACE, "DEF")


@dataclass(frozen=True)
class Op:
    """One op: ``overload`` is what stands in graphs, ``definition`` what it means."""

    name: str
    schema: str
    definition: Callable[..., Any]
    overload: torch._ops.OpOverload

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.overload(*args, **kwargs)


VOCABULARY: dict[str, Op] = {}


def op(schema: str, *, fake: Callable[..., Any] | None = None) -> Callable[[Callable[..., Any]], Op]:
    """Declare an op from its schema and the definition below the decorator.

    ``fake`` returns an empty tensor of the result's shape and dtype without tracing the definition
    (compiling asks for thousands of them); without it the definition runs on fake tensors too.
    """

    def declare(definition: Callable[..., Any]) -> Op:
        name = schema.split("(", 1)[0]
        _library.define(schema)
        _library.impl(name, definition, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake or definition, lib=_library)
        declared = Op(name, schema, definition, getattr(torch.ops.infercomp, name).default)
        VOCABULARY[name] = declared
        return declared

    return declare


def like_first(first: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """The fake of an op whose result has its first operand's shape and dtype."""
    return first.new_empty(first.shape)


def definition_of(target: object) -> Op | None:
    """The vocabulary's entry behind a graph target, or None for a target that is not ours."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE:
        return VOCABULARY.get(target._schema.name.split("::", 1)[1])
    return None


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype that reductions are carried out in: float32, or float64 for float64 inputs."""
    return torch.promote_types(tensor.dtype, torch.float32)
