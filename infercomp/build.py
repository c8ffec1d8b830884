"""``infercomp build``: the Triton kernels of a model compiled for a GPU that need not be here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from . import __version__
from .codegen.grouping import Group, Planner
from .codegen.specs import spec_name
from .codegen.triton.compile import compile_text, gpu_target
from .codegen.triton.emit_specs import emit_spec
from .codegen.triton.kernel_text import Launch
from .config import Config
from .passes.pipeline import run_pipeline
from .runtime.errors import BuildError, ConfigError
from .serving import capture_for_serving, position_limit

MANIFEST_VERSION = 1


@dataclass(frozen=True)
class BuiltKernel:
    """One compiled kernel; ``grid`` and ``condition`` are expressions of the sizes among its ``arguments``."""

    name: str
    ops: tuple[str, ...]
    calls: int
    binary: str
    text: str
    grid: tuple[str, str, str]
    condition: str
    num_warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Build:
    """What was written to ``folder``; ``elsewhere`` are ops without a kernel and why."""

    target: str
    folder: Path
    kernels: tuple[BuiltKernel, ...]
    elsewhere: dict[str, str]


def build_kernels(model: torch.nn.Module, target: str, folder: Path, config: Config) -> Build:
    """Capture a causal language model, plan it for Triton and compile every kernel for ``target`` ("cuda:90" …).

    Writes each kernel's text and binary and ``manifest.json``. Raises KernelCompileError for a target that
    Triton does not know or a kernel that does not compile, BuildError for a folder that cannot be written,
    ConfigError for a cache that no Triton kernel reads, and what capturing raises.
    """
    gpu_target(target)
    if config.passes.kv_cache_layout == "tiled":
        remedy = 'leave it "auto"'
        raise ConfigError("Triton kernels read a cache in rows", field="kv_cache_layout", remedy=remedy)
    if config.passes.kv_cache_dtype != "auto":
        raise ConfigError("no Triton kernel reads a cache of int8", field="kv_cache_dtype", remedy='leave it "auto"')
    captured, examples = capture_for_serving(model.eval(), position_limit(model))
    passes = replace(config.passes, kv_cache_layout="rows")
    run_pipeline(captured, passes, serving=True, example_inputs=examples)
    plan = Planner(captured, "triton").plan()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kernels = tuple(_compiled(plan.groups, target, folder))
        elsewhere = {str(node.target): reason for node, reason in plan.refused.items()}
        build = Build(target, folder, kernels, elsewhere)
        (folder / "manifest.json").write_text(json.dumps(_manifest(build), indent=1) + "\n")
    except OSError as error:
        raise BuildError(f"{folder} cannot be written: {error}", field="output", remedy="name another folder") from None
    return build


def _compiled(groups: list[Group], target: str, folder: Path) -> Iterator[BuiltKernel]:
    """Each distinct kernel once."""
    calls: dict[str, list[Group]] = {}
    for group in groups:
        calls.setdefault(spec_name(group.spec), []).append(group)
    for name, same in calls.items():
        ops = tuple(dict.fromkeys(str(node.target) for node in same[0].nodes))
        for launch in emit_spec(same[0].spec, name).launches:
            yield _written(launch, ops, len(same), target, folder)


def _written(launch: Launch, ops: tuple[str, ...], calls: int, target: str, folder: Path) -> BuiltKernel:
    compiled = compile_text(launch.text, target)
    binary, text = f"{launch.name}.{'cubin' if target.startswith('cuda') else 'hsaco'}", f"{launch.name}.py"
    (folder / binary).write_bytes(compiled.binary)
    (folder / text).write_text(launch.text)
    resources = compiled.resources
    return BuiltKernel(
        launch.name,
        ops,
        calls,
        binary,
        text,
        launch.grid,
        launch.condition,
        compiled.num_warps,
        resources.registers,
        resources.spill_bytes,
        compiled.shared_bytes,
    )


def _manifest(build: Build) -> dict[str, object]:
    import triton

    return {
        "version": MANIFEST_VERSION,
        "target": build.target,
        "infercomp": __version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": [asdict(kernel) for kernel in build.kernels],
        "elsewhere": build.elsewhere,
    }
