"""What a pass is, and what the frame lets it do: claim a match, replace a node, say why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..codegen.model_graph import ModelGraph, source_line
from .calibration import Calibration, Progress, silent
from .config import PassConfig
from .linear_recipes import LinearRecipe
from .record import LayerError, NearMiss, Site

InputAdapter = Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class NumericClass:
    """How far a pass may move the outputs; ``bound`` is the relative error allowed.

    It is measured in float64, or in the graph's own dtypes where ``is_widened`` is False. Where ``is_local``
    each site gets what it got before the pass, so that errors do not add up, and is held against its own size.
    """

    name: str
    bound: float
    is_widened: bool = True
    is_local: bool = False


EXACT = NumericClass("exact", 1e-9)
# The same calls on the same values: holds in the graph's own dtypes, and only there.
BIT_IDENTICAL = NumericClass("bit-identical", 0.0, is_widened=False)
# Rounding that the user asked for. Its error is for the report; the bound only tells it from a wrong result: zeros
# err by 1, and values that have nothing to do with the right ones by more.
LOSSY = NumericClass("lossy", 0.5, is_widened=False, is_local=True)


@dataclass(frozen=True)
class Pass:
    """A named rewrite. ``run(model_graph, context)`` does only its own work; the frame does the rest.

    ``after`` names passes that must stand earlier in the pipeline; ``serving`` passes run only for
    ``LLM``; ``optional`` is False for a pass that serving cannot do without.
    """

    name: str
    run: Callable[[ModelGraph, PassContext], None]
    numeric_class: NumericClass = EXACT
    after: tuple[str, ...] = ()
    serving: bool = False
    optional: bool = True


@dataclass(frozen=True)
class Decision:
    """What an earlier pass has decided of a layer by its weight: the recipe, or None for floats, and why.

    ``names`` are those of the layer that the weight is a part of; ``input_step`` is that of the grid of 8 bits on which
    all tokens of its input are, where each has none of its own.
    """

    recipe: LinearRecipe | None
    reason: str
    names: tuple[str, ...]
    input_step: float | None = None


@dataclass
class MatchBudget:
    """Matches that may still be applied over the whole pipeline; None is no limit."""

    remaining: int | None

    def spend(self) -> bool:
        if self.remaining is None:
            return True
        self.remaining -= 1
        return self.remaining >= 0


class PassContext:
    """The frame's side of one pass run."""

    def __init__(
        self,
        name: str,
        config: PassConfig,
        budget: MatchBudget,
        calibration: Calibration | None = None,
        decisions: dict[str, Decision] | None = None,
        evaluation: Sequence[Mapping[str, Any]] = (),
        progress: Progress = silent,
    ) -> None:
        self.name = name
        self.config = config
        self.calibration = calibration
        self.decisions = {} if decisions is None else decisions
        self.evaluation = evaluation
        self.progress = progress
        self.layer_errors: list[LayerError] = []
        self.sites: list[Site] = []
        self.near_misses: list[NearMiss] = []
        self.num_skipped = 0
        self.input_adapter: InputAdapter | None = None
        self._disabled = frozenset(config.disable)
        self._budget = budget
        self._num_candidates = 0

    def claim(self, node: fx.Node) -> Site | None:
        """A site for a match at ``node``, or None where the user switched it off or the limit is reached.

        Indices count candidates, applied or not, so that ``pass#12`` names the same place in every run.
        """
        index, self._num_candidates = self._num_candidates, self._num_candidates + 1
        if self.name in self._disabled or f"{self.name}#{index}" in self._disabled or not self._budget.spend():
            self.num_skipped += 1
            return None
        site = Site(index, node.name, source_line(node))
        self.sites.append(site)
        return site

    def replace(self, site: Site, old: fx.Node, new: fx.Node) -> None:
        """Put ``new`` in the place of ``old`` in every use."""
        old.replace_all_uses_with(new, propagate_meta=False)
        site.replaced[old.name] = new.name

    def near_miss(self, node: fx.Node, reason: str) -> None:
        self.near_misses.append(NearMiss(node.name, reason, source_line(node)))


def is_float_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
