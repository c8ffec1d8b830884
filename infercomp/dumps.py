"""Dumps: numbered files of the graph, one after every pass that changed it, each of which runs.

    dump/00_captured.py  01_normalize.py  …  weights.safetensors  inputs_00.safetensors  report.json  kernels/

Weights and inputs are held by reference in safetensors files beside the graphs. ``python 04_….py``
runs the graph and prints its outputs' shapes and checksums, so that two stages can be compared by hand.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import fx

from .codegen.model_graph import ModelGraph, source_line
from .graph_text import argument_text, target_text
from .report import Report
from .runtime.errors import ConfigError

KERNELS = "kernels"
_WRITTEN = ("[0-9][0-9]_*.py", "*.safetensors", f"{KERNELS}/*_*.cpp", f"{KERNELS}/*_*.py", "report.json")
_opened: dict[str, int] = {}


def open_dump(directory: str) -> Dump:
    """The dump of one compilation: ``directory`` itself for the first in this process, then ``graph_1`` …"""
    root = Path(directory).expanduser().absolute()
    number = _opened.get(str(root), 0)
    _opened[str(root)] = number + 1
    return Dump(root / f"graph_{number}" if number else root)


class Dump:
    """Writes the stages of one graph into a folder; earlier dumps in it are replaced."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._saved_weights: set[str] = set()
        self._num_weight_files = 0
        try:
            (directory / KERNELS).mkdir(parents=True, exist_ok=True)
            for pattern in _WRITTEN:
                for stale in directory.glob(pattern):
                    stale.unlink()
        except OSError as error:
            raise ConfigError(
                f"the dump folder cannot be written: {error.strerror}",
                field="dump",
                where=str(directory),
                remedy="name a folder that can be created and written",
            ) from error

    def write_graph(self, index: int, name: str, model_graph: ModelGraph, inputs: Mapping[str, Any] | None) -> None:
        """Write stage ``index``; tensors that are not in an earlier file go into a new one."""
        self._save_weights(model_graph)
        if inputs is not None:
            tensors = {key: _as_tensor(inputs[key]) for key in model_graph.input_names}
            _save(self.directory / f"inputs_{index:02d}.safetensors", tensors)
        text = python_source(model_graph, name, index)
        (self.directory / f"{index:02d}_{name}.py").write_text(text)

    def write_kernels(self, files: Mapping[str, str]) -> None:
        """The generated kernels: files by name, in the folder ``kernels``."""
        for name, text in files.items():
            (self.directory / KERNELS / name).write_text(text)

    def write_report(self, report: Report) -> None:
        temporary = self.directory / "report.json.part"
        temporary.write_text(report.to_json())
        os.replace(temporary, self.directory / "report.json")

    def _save_weights(self, model_graph: ModelGraph) -> None:
        new = {name: tensor for name, tensor in model_graph.weights.items() if name not in self._saved_weights}
        if not new:
            return
        suffix = f"_{self._num_weight_files}" if self._num_weight_files else ""
        _save(self.directory / f"weights{suffix}.safetensors", {k: v.detach() for k, v in new.items()})
        self._saved_weights.update(new)
        self._num_weight_files += 1


def _as_tensor(value: Any) -> torch.Tensor:
    return value.detach() if isinstance(value, torch.Tensor) else torch.tensor(int(value))


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """One tensor that several names share is stored once a name; a half-written file never stays."""
    temporary = path.with_suffix(".part")
    try:
        seen: set[int] = set()
        own: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            address = tensor.untyped_storage().data_ptr()
            shared = address in seen or not tensor.is_contiguous()
            seen.add(address)
            own[name] = tensor.contiguous().clone() if shared else tensor
        save_file(own, temporary)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def python_source(model_graph: ModelGraph, name: str, index: int) -> str:
    """The graph as a Python file that runs: one call a line, headed by the model's source line it came from."""
    arguments = ", ".join([*model_graph.weights, *model_graph.input_names])
    body = "\n".join(f"    {line}" for line in _statements(model_graph.graph))
    return _TEMPLATE.format(
        name=name,
        index=index,
        arguments=arguments,
        body=body,
        weights=tuple(model_graph.weights),
        inputs=tuple(model_graph.input_names),
        scalars=tuple(n for n in model_graph.input_names if not _is_tensor(model_graph, n)),
    )


def _is_tensor(model_graph: ModelGraph, name: str) -> bool:
    return isinstance(model_graph.placeholder(name).meta["val"], torch.Tensor)


def _statements(graph: fx.Graph) -> Iterator[str]:
    previous = None
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            yield f"return {argument_text(tuple(node.args[0]))}"
            continue
        line = source_line(node)
        if line is not None and line != previous:
            yield f"# {line}"
            previous = line
        operands = [argument_text(argument) for argument in node.args]
        operands += [f"{key}={argument_text(value)}" for key, value in node.kwargs.items()]
        yield f"{node.name} = {target_text(node)}({', '.join(operands)}){_comment(node)}"


def _comment(node: fx.Node) -> str:
    """The dtype and shape of a call's result, and the kernel that a fusion put it into."""
    value, parts = node.meta.get("val"), []
    if isinstance(value, torch.Tensor):
        shape = ", ".join(str(extent) for extent in value.shape)
        parts.append(f"{str(value.dtype).removeprefix('torch.')} [{shape}]")
    if "kernel" in node.meta:
        parts.append(f"in the kernel of {node.meta['kernel']}")
    return f"  # {', '.join(parts)}" if parts else ""


_TEMPLATE = '''"""Stage {index}, after {name}: a graph of infercomp. Run it: python {index:02d}_{name}.py"""

import math  # noqa: F401
import operator  # noqa: F401
from pathlib import Path

import torch
from safetensors import safe_open

import infercomp.codegen.ops  # noqa: F401  (registers torch.ops.infercomp)

WEIGHTS = {weights!r}
INPUTS = {inputs!r}
SCALARS = {scalars!r}


def forward({arguments}):
{body}


def _tensors(pattern):
    folder = Path(__file__).parent
    tensors = {{}}
    for path in sorted(folder.glob(pattern)):
        with safe_open(path, framework="pt") as file:
            tensors.update({{name: file.get_tensor(name) for name in file.keys()}})
    return tensors


def main():
    weights, inputs = _tensors("weights*.safetensors"), _tensors("inputs_{index:02d}.safetensors")
    arguments = [weights[name] for name in WEIGHTS]
    arguments += [inputs[name].item() if name in SCALARS else inputs[name] for name in INPUTS]
    with torch.inference_mode():
        outputs = forward(*arguments)
    for position, output in enumerate(outputs):
        if isinstance(output, torch.Tensor):
            print(position, tuple(output.shape), output.dtype, f"sum={{output.double().sum().item():.12g}}")
        else:
            print(position, output)
    return outputs


if __name__ == "__main__":
    main()
'''
