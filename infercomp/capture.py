"""Capture: Dynamo's graph and torch.export's program, brought into one normal form.

Both come out as functional pre-dispatch ATen (linear, scaled_dot_product_attention, silu … stay
whole) with symbolic sizes, every parameter an explicit placeholder known by name and value.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx._lazy_graph_module import _use_lazy_graph_module

from .codegen.model_graph import ModelGraph, dense_order, value_of
from .runtime.errors import CaptureError

_DROPPED_ASSERTS = {
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten._assert_async.msg,
    torch.ops.aten.sym_constrain_range_for_size.default,
    torch.ops.aten.sym_constrain_range.default,
}


def capture_dynamo(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> ModelGraph:
    """The normal form of the graph that Dynamo hands to a backend; parameters are taken by identity.

    Raises CaptureError for a graph that cannot be traced into functional ATen.
    """
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    fakes = [node.meta["example_value"] for node in placeholders]
    fake_mode = _fake_mode_of(fakes)
    try:
        with fake_mode, torch.no_grad(), fx.traceback.preserve_node_meta():
            functional, signature = aot_export_module(graph_module, tuple(fakes), trace_joint=False, pre_dispatch=True)
    except Exception as error:  # what tracing arbitrary code may raise has no common class
        raise CaptureError(
            f"a graph of Dynamo cannot be made functional: {_first_line(error)}",
            where=_location(error),
            remedy="compile a part of the model that has no such code",
        ) from error
    flat = [node for node in functional.graph.nodes if node.op == "placeholder"]
    names = {node.name: original.name for node, original in zip(flat, placeholders, strict=True)}
    mutated = {functional_name: names[name] for functional_name, name in signature.user_inputs_to_mutate.items()}
    model_graph = _assemble(functional, fake_mode)
    for node, original, example in zip(flat, placeholders, example_inputs, strict=True):
        _rename(node, original.name)
        if isinstance(example, torch.nn.Parameter):
            model_graph.weights[node.name] = example.detach()
            model_graph.weight_sources[node.name] = _dynamo_parameter_name(original.name)
    model_graph.input_names = tuple(node.name for node in flat if node.name not in model_graph.weights)
    model_graph.mutated_inputs = tuple(mutated.values())
    return _weights_first(model_graph)


def _fake_mode_of(fakes: Sequence[Any]) -> FakeTensorMode:
    context = torch._guards.TracingContext.try_get()
    mode = context.fake_mode if context else torch._guards.detect_fake_mode(list(fakes))
    if mode is None:
        raise CaptureError(
            "Dynamo's graph carries no fake tensors",
            remedy='call it through torch.compile(model, backend="infercomp")',
        )
    return mode


def _dynamo_parameter_name(placeholder: str) -> str:
    """``l_self_modules_model_modules_norm_parameters_weight_`` -> ``model.norm.weight``, for people to read."""
    name = re.sub(r"^l_(self|fn|args_\d+|mod|kwargs_\w+?)_+", "", placeholder).rstrip("_")
    return re.sub(r"_?(?:modules|parameters|buffers)_", ".", "_" + name).strip("._")


def capture_export(
    module: torch.nn.Module, example_kwargs: dict[str, torch.Tensor], *, max_length: int | None = None
) -> ModelGraph:
    """The normal form of ``module(**example_kwargs)``, exported with dimension 1 of every input symbolic.

    The weights are owned by the returned graph (``frozen``): passes may fold and replace them. Raises
    CaptureError for a model that cannot be exported whole for every length from 2 to ``max_length``.
    """
    length = Dim("length", min=2, max=max_length)
    shapes = {name: {1: length} for name in example_kwargs}
    try:
        # Export prints the graph as Python after each of its own passes, which nobody reads: a fifth of its time.
        with torch.no_grad(), warnings.catch_warnings(), _use_lazy_graph_module(True):
            warnings.simplefilter("ignore")
            program = _functional(torch.export.export(module, (), example_kwargs, dynamic_shapes=shapes, strict=False))
    except Exception as error:  # what tracing arbitrary code may raise has no common class
        raise CaptureError(
            f"{type(module).__name__} cannot be exported as one graph: {_first_line(error)}",
            where=_location(error),
            remedy="see the cause above; a model must be free of data-dependent Python control flow",
        ) from error
    return _from_exported(program)


def _from_exported(program: torch.export.ExportedProgram) -> ModelGraph:
    graph_module = fx.GraphModule({}, fx.Graph())
    graph_module.graph = program.graph_module.graph
    for name, tensor in vars(program.graph_module).items():
        if isinstance(tensor, torch.Tensor):
            setattr(graph_module, name, tensor)
    values = {**program.state_dict, **program.constants}
    placeholders = {node.name: node for node in graph_module.graph.nodes if node.op == "placeholder"}
    model_graph = _assemble(graph_module, _fake_mode_of([node.meta["val"] for node in placeholders.values()]))
    inputs = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(spec.arg.name)
            continue
        # The parameter itself, not an alias: a merge makes it a view of the merged tensor, and no second copy stays.
        model_graph.weights[spec.arg.name] = values[spec.target]
        model_graph.weight_sources[spec.arg.name] = spec.target
    model_graph.input_names = tuple(inputs)
    model_graph.mutated_inputs = tuple(_mutated_inputs(program))
    model_graph.frozen = True
    return _weights_first(model_graph)


def _mutated_inputs(program: torch.export.ExportedProgram) -> Iterator[str]:
    for spec in program.graph_signature.output_specs:
        if spec.kind is OutputKind.USER_INPUT_MUTATION:
            yield spec.target
        elif spec.kind is OutputKind.BUFFER_MUTATION:
            raise CaptureError(
                f"the model writes to its buffer {spec.target}",
                remedy="pass what the model remembers (a cache, for instance) as an input, or switch it off",
            )


def _assemble(graph_module: fx.GraphModule, fake_mode: FakeTensorMode) -> ModelGraph:
    """Drop asserts, turn stray tensor attributes into constants, and make every output a flat tuple."""
    model_graph = ModelGraph(graph_module, {}, (), fake_mode)
    outputs = model_graph.output_node().args[0]
    model_graph.output_orders = tuple(dense_order(value_of(output)) for output in outputs)
    for node in list(graph_module.graph.nodes):
        if node.target in _DROPPED_ASSERTS:
            graph_module.graph.erase_node(node)
    attributes: dict[str, fx.Node] = {}
    for node in [node for node in graph_module.graph.nodes if node.op == "get_attr"]:
        tensor = getattr(graph_module, node.target)
        if not isinstance(tensor, torch.Tensor):
            raise CaptureError(f"the graph holds a subgraph {node.target!r}, which cannot be captured")
        if node.target not in attributes:
            with torch.no_grad():
                value = node.meta.get("val")
                value = fake_mode.from_tensor(tensor) if value is None else value
            constant = model_graph.add_placeholder(f"constant_{len(attributes)}", value, weight=tensor)
            attributes[node.target] = constant
        node.replace_all_uses_with(attributes[node.target])
        graph_module.graph.erase_node(node)
    return model_graph


def _rename(node: fx.Node, name: str) -> None:
    node.name = name
    node.target = name


def _weights_first(model_graph: ModelGraph) -> ModelGraph:
    placeholders = [node for node in model_graph.graph.nodes if node.op == "placeholder"]
    by_name = {node.name: node for node in placeholders}
    ordered = [by_name[name] for name in (*model_graph.weights, *model_graph.input_names)]
    root = model_graph.graph._root
    for node in reversed(ordered):
        root.append(node)
    model_graph.graph.lint()
    model_graph.graph_module.recompile()
    return model_graph


def _functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with writes turned into extra outputs; one that writes nothing is returned as it is."""
    targets = [node.target for node in program.graph.nodes]
    writes = any(isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable for target in targets)
    return program.run_decompositions({}) if writes else program


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _location(error: BaseException) -> str | None:
    frames = inspect.getinnerframes(error.__traceback__) if error.__traceback__ else []
    libraries = tuple(f"{Path(root).parent}/" for root in (torch.__file__, __file__))
    for frame in reversed(frames):
        if not frame.filename.startswith(libraries):
            return f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno} in {frame.function}"
    return None
