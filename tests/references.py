"""What outputs are compared with: the model itself in float64, and its own greedy tokens.

The rule for numbers is everywhere the same: infercomp may err against float64 at most twice as much
as eager does, plus one unit in the last place. The rule for tokens: equal, or the reference's two
best logits lie closer together than float32 can tell apart at that very step.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from infercomp import backend
from infercomp.report import Report


class _Widening(TorchDispatchMode):
    """Models cast to float32 in norms and softmax by name; here such a cast goes to float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(torch.dtype, _widened, (args, kwargs or {}))
        return func(*args, **kwargs)


def _widened(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype


class Float64Model:
    """A copy of a model that computes in float64 all through."""

    def __init__(self, model: nn.Module) -> None:
        self._model = copy.deepcopy(model).double()

    def __call__(self, **inputs: Any) -> Any:
        wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
        with _Widening(), torch.inference_mode():
            return self._model(**wide)


def tensors_of(output: Any) -> list[torch.Tensor]:
    """Every tensor of a model's output in order, those of caches too."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = output.values()
    elif hasattr(output, "layers"):
        output = [tensor for layer in output.layers for tensor in (layer.keys, layer.values)]
    elif not isinstance(output, (list, tuple)):
        return []
    return [tensor for part in output for tensor in tensors_of(part)]


def assert_errs_like_eager(exact: torch.Tensor, eager: torch.Tensor, found: torch.Tensor) -> None:
    """``found`` is at most twice as far from float64 as ``eager``, plus one unit in the last place."""
    assert found.dtype == eager.dtype and found.shape == eager.shape == exact.shape
    unit = torch.finfo(eager.dtype).eps * max(1.0, float(exact.abs().max()))
    allowed = 2 * float((eager.double() - exact).abs().max()) + unit
    error = float((found.double() - exact).abs().max())
    assert error <= allowed, f"off by {error:.3g} where twice eager's own error is {allowed:.3g}"


def greedy_tokens(model: nn.Module, prompt: Sequence[int], num_tokens: int, **options: Any) -> list[int]:
    """What ``model.generate`` appends to one prompt, greedily and past any end-of-sequence token."""
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )
    return output[0, len(prompt) :].tolist()


def assert_same_tokens(
    model: nn.Module, exact: Callable[[], Float64Model], prompt: Sequence[int], expected: list[int], found: list[int]
) -> None:
    """Equal token for token, or parted where float32 cannot tell the reference's two candidates apart."""
    assert len(found) == len(expected)
    step = next((i for i, (one, other) in enumerate(zip(expected, found, strict=True)) if one != other), None)
    if step is None:
        return
    ids = torch.tensor([[*prompt, *expected[:step]]])
    with torch.inference_mode():
        rounded = model(input_ids=ids).logits[0, -1].double()
    true = exact()(input_ids=ids).logits[0, -1]
    rounding = float((rounded - true).abs().max())
    one, other = expected[step], found[step]
    gap = abs(float(true[one] - true[other]))
    message = (
        f"parted at step {step}: reference {one} (logit {float(true[one]):.9f}), found {other} "
        f"(logit {float(true[other]):.9f}) in float64; gap {gap:.3g}, float32 errs by {rounding:.3g}"
    )
    assert gap < 2 * rounding, message
    print(f"tie, {message}")


class Watch:
    """The calls of infercomp's backend inside a ``watched_compilations`` block."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.reports: list[Report] = []


@contextlib.contextmanager
def watched_compilations() -> Iterator[Watch]:
    """Count how often Dynamo calls the backend, and keep what each compilation reports."""
    watch = Watch()
    compile_dynamo = backend.compile_dynamo

    def watched(graph_module: Any, example_inputs: Any, options: Any, on_report: Any = None) -> Any:
        watch.num_calls += 1
        return compile_dynamo(graph_module, example_inputs, options, on_report or watch.reports.append)

    torch._dynamo.reset()
    with mock.patch.object(backend, "compile_dynamo", watched):
        yield watch
    torch._dynamo.reset()
