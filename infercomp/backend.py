"""The door for ``torch.compile(model, backend="infercomp")``, found through ``torch_dynamo_backends``.

Inference only: a graph that needs gradients or drops activations goes to Inductor with one warning
that names the remedy, and so does a graph in which nothing of a transformer is recognised; under
``strict`` both are errors. Errors are raised when the compiled model is called, as Dynamo would wrap
them otherwise.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .capture import capture_dynamo
from .codegen.model_graph import ModelGraph
from .compiler import Compiled, lower_graph, rewrite_graph
from .config import Config, parse_options
from .report import Report
from .runtime.errors import CaptureError, ConfigError, FallbackWarning, InfercompError, UnsupportedError
from .runtime.program import BoundProgram

OnReport = Callable[[Report], None]
Runner = Callable[..., Sequence[Any]]


def infercomp(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Runner:
    """Dynamo's backend: compile one graph. ``options`` are those of ``infercomp.config.parse_options``."""
    if mode is not None:
        remedy = "leave mode out; what infercomp can be told is in options"
        return _raising(ConfigError(f"mode={mode!r} is a mode of Inductor", field="mode", remedy=remedy))
    return compile_dynamo(graph_module, example_inputs, options)


def compile_dynamo(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Mapping[str, Any] | None,
    on_report: OnReport | None = None,
) -> Runner:
    """Compile one of Dynamo's graphs; ``on_report`` is told what was done."""
    try:
        config = parse_options(options)
        return _compile(graph_module, example_inputs, config, on_report or (lambda report: None))
    except InfercompError as error:
        return _raising(error)


def _raising(error: InfercompError) -> Runner:
    def run(*_: Any) -> Sequence[Any]:
        raise error

    return run


def _compile(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], config: Config, on_report: OnReport
) -> Runner:
    if _needs_gradients(example_inputs):
        reason = "gradients are on and the model's parameters require them"
        return _fall_back(graph_module, example_inputs, config, on_report, reason)
    try:
        model_graph = capture_dynamo(graph_module, example_inputs)
    except CaptureError as error:
        return _fall_back(graph_module, example_inputs, config, on_report, error.what, remedy=None)
    if _drops_activations(model_graph):
        reason = "the model is in training mode (its dropout or batch norm is active)"
        return _fall_back(graph_module, example_inputs, config, on_report, reason)
    placeholders = [node.name for node in graph_module.graph.nodes if node.op == "placeholder"]
    examples = dict(zip(placeholders, map(_concrete, example_inputs), strict=True))
    rewritten = rewrite_graph(model_graph, config, examples)
    if not rewritten.is_transformer:
        reason = "nothing of a transformer was recognised in this graph"
        return _fall_back(graph_module, example_inputs, config, on_report, reason, remedy=None)
    compiled = lower_graph(rewritten, config)
    on_report(compiled.report)
    return _Runner(compiled, placeholders)


def _concrete(value: Any) -> Any:
    """The value seen now; reading it through ``int`` would guard on it, and every length would compile anew."""
    return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else value


def _needs_gradients(example_inputs: Sequence[Any]) -> bool:
    tensors = (value for value in example_inputs if isinstance(value, torch.Tensor))
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


_DROPOUTS = (
    torch.ops.aten.dropout.default,
    torch.ops.aten.native_dropout.default,
    torch.ops.aten.feature_dropout.default,
)


def _drops_activations(model_graph: ModelGraph) -> bool:
    """Whether a dropout with a probability above 0, in SDPA too, or a batch norm runs as in training."""
    for node in model_graph.graph.nodes:
        if node.target in _DROPOUTS and node.args[2] and node.args[1]:
            return True
        if node.target == torch.ops.aten.scaled_dot_product_attention.default:
            dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
            if dropout:
                return True
        if node.target == torch.ops.aten.batch_norm.default and node.args[5]:
            return True
    return False


def _fall_back(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: Config,
    on_report: OnReport,
    reason: str,
    remedy: str | None = "call model.eval() and run it under torch.inference_mode()",
) -> Runner:
    if config.strict:
        raise UnsupportedError(
            f"strict: {reason}, so this graph would run by Inductor",
            remedy=remedy or "compile only the transformer, or leave strict off",
        )
    hint = f"; to use infercomp, {remedy}" if remedy else ""
    warnings.warn(f"infercomp hands this graph to Inductor: {reason}{hint}", FallbackWarning, stacklevel=2)
    on_report(Report(fallbacks=(f"Inductor runs a graph: {reason}",)))
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph_module, list(example_inputs))


class _Runner:
    """Calls the program with the weights that Dynamo passes.

    Dynamo may use one compiled graph for several modules of equal structure, so weights are bound
    per set of parameters, and again if a parameter was given other storage.
    """

    def __init__(self, compiled: Compiled, placeholders: list[str]) -> None:
        self._program = compiled.program
        graph = compiled.model_graph
        self._constants = {n: t for n, t in graph.weights.items() if n not in graph.weight_sources}
        self._weight_positions = [(placeholders.index(n), n) for n in graph.weights if n in graph.weight_sources]
        self._input_positions = [placeholders.index(name) for name in compiled.program.input_names]
        self._bound: dict[tuple[int, ...], BoundProgram] = {}

    def __call__(self, *arguments: Any) -> Sequence[Any]:
        key = tuple(id(arguments[position]) for position, _ in self._weight_positions)
        bound = self._bound.get(key)
        if bound is None or not bound.is_current():
            bound = self._bind(key, arguments)
        return bound(*(arguments[position] for position in self._input_positions))

    def _bind(self, key: tuple[int, ...], arguments: tuple[Any, ...]) -> BoundProgram:
        weights = {name: arguments[position] for position, name in self._weight_positions}
        bound = self._program.bind({**self._constants, **weights})
        self._bound[key] = bound
        if weights:
            # An id may be used again once its parameter is gone.
            weakref.finalize(next(iter(weights.values())), self._bound.pop, key, None)
        return bound
