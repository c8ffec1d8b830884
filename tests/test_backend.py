"""The door of ``torch.compile``: options, fallbacks, errors, and who owns the weights."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from families import FAMILIES, Family
from references import Float64Model, Watch, assert_errs_like_eager, watched_compilations
from torch import nn
from torch.nn import functional

from infercomp import ConfigError, InfercompError, UnsupportedError, VerificationError, compiler
from infercomp.codegen.model_graph import ModelGraph
from infercomp.codegen.ops import attention
from infercomp.passes.graph_pass import Pass, PassContext
from infercomp.passes.pipeline import PIPELINE, run_pipeline
from infercomp.runtime.errors import FallbackWarning

LLAMA = FAMILIES["llama"]


@pytest.fixture
def watch() -> Iterator[Watch]:
    with watched_compilations() as watch:
        yield watch


def run(model: nn.Module, family: Family = LLAMA, seed: int = 1) -> torch.Tensor:
    with torch.inference_mode():
        return model(**family.example_inputs(seed=seed)).logits


def assert_right(found: torch.Tensor, uncompiled: nn.Module, family: Family = LLAMA, seed: int = 1) -> None:
    """Against a model that was never compiled and holds the same weights."""
    exact = Float64Model(uncompiled)(**family.example_inputs(seed=seed)).logits
    assert_errs_like_eager(exact, run(uncompiled, family, seed), found)


class Attend(nn.Module):
    """The smallest thing that is ours: one attention over its input, with dropout in training."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        scores = functional.softmax(hidden @ self.projection(hidden).transpose(-1, -2) / 8**0.5, dim=-1)
        return functional.dropout(scores, 0.5, self.training) @ hidden


HIDDEN = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))

# ---------------------------------------------------------------- options

PROGRAM = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(config).eval().requires_grad_(False)
assert not any(name.split(".")[0] == "infercomp" for name in sys.modules)
ids = torch.arange(5)[None]
with torch.inference_mode():
    expected = model(ids).logits
    found = torch.compile(model, backend="infercomp", options={"strict": True})(ids).logits
torch.testing.assert_close(found, expected)
assert "infercomp.backend" in sys.modules
print("compiled")
"""


def test_the_name_alone_finds_the_backend(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0 and "compiled" in run.stdout, run.stderr


def test_a_pass_can_be_left_out(watch: Watch) -> None:
    model = LLAMA.build("sdpa")
    compiled = torch.compile(model, backend="infercomp", options={"disable": ["fuse_rope"], "strict": True})
    assert_right(run(compiled), LLAMA.build("sdpa"))
    (report,) = watch.reports
    rope = next(record for record in report.passes if record.name == "fuse_rope")
    assert (rope.matches, rope.skipped) == (0, 4)
    assert report.matches_of("recognize_attention") == LLAMA.num_attention_layers


def test_one_match_can_be_left_out_and_the_number_limited(watch: Watch) -> None:
    model = LLAMA.build("sdpa")
    compiled = torch.compile(model, backend="infercomp", options={"disable": "recognize_attention#1"})
    assert_right(run(compiled), LLAMA.build("sdpa"))
    assert watch.reports[0].matches_of("recognize_attention") == 1
    torch._dynamo.reset()
    limited = torch.compile(LLAMA.build("sdpa"), backend="infercomp", options={"limit": 50})
    assert_right(run(limited), LLAMA.build("sdpa"))
    assert sum(record.matches for record in watch.reports[1].passes) == 50


@pytest.mark.parametrize(
    ("options", "field", "nearest"),
    [
        ({"verfy": True}, "verfy", "'verify'"),
        ({"disable": ["fuse_ropes"]}, "disable", "'fuse_rope'"),
        ({"disable": ["recognise_attention#1"]}, "disable", "'recognize_attention'"),
        ({"strict": 1}, "strict", "true or false"),
    ],
)
@pytest.mark.usefixtures("watch")
def test_a_bad_option_names_the_nearest(options: dict[str, Any], field: str, nearest: str) -> None:
    compiled = torch.compile(Attend().eval().requires_grad_(False), backend="infercomp", options=options)
    with pytest.raises(ConfigError) as caught, torch.inference_mode():
        compiled(HIDDEN)
    assert type(caught.value) is ConfigError
    assert caught.value.field == field and nearest in str(caught.value)


# ---------------------------------------------------------------- fallbacks


@pytest.fixture
def inductor() -> Iterator[mock.Mock]:
    """In the place of Inductor's compiler: runs the graph as it is, and counts."""
    with mock.patch("torch._inductor.compile_fx.compile_fx", side_effect=lambda graph, _: graph.forward) as inductor:
        yield inductor


def relu(hidden: torch.Tensor) -> torch.Tensor:
    return functional.relu(hidden) * 2


def test_training_mode_goes_to_inductor_with_the_remedy(watch: Watch, inductor: mock.Mock) -> None:
    compiled = torch.compile(Attend().train().requires_grad_(False), backend="infercomp")
    with pytest.warns(FallbackWarning, match=r"training mode[\s\S]*model\.eval\(\)[\s\S]*inference_mode\(\)") as caught:
        compiled(HIDDEN)
        compiled(HIDDEN + 1)
    assert len([each for each in caught if each.category is FallbackWarning]) == 1
    assert inductor.call_count == 1
    assert len(watch.reports[0].fallbacks) == 1 and "training mode" in watch.reports[0].fallbacks[0]


def test_gradients_go_to_inductor_with_the_remedy(watch: Watch, inductor: mock.Mock) -> None:
    model = Attend().eval()
    compiled = torch.compile(model, backend="infercomp")
    with pytest.warns(FallbackWarning, match=r"gradients[\s\S]*torch\.inference_mode\(\)"):
        compiled(HIDDEN).sum().backward()
    assert inductor.call_count == 1
    assert model.projection.weight.grad is not None
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(compiled(HIDDEN), Attend.forward(model, HIDDEN))
    assert inductor.call_count == 1 and watch.reports[-1].matches_of("recognize_attention") == 1


def test_a_graph_of_no_transformer_goes_to_inductor(watch: Watch, inductor: mock.Mock) -> None:
    with pytest.warns(FallbackWarning, match="nothing of a transformer"), torch.inference_mode():
        found = torch.compile(relu, backend="infercomp")(HIDDEN)
    torch.testing.assert_close(found, relu(HIDDEN))
    assert inductor.call_count == 1 and watch.num_calls == 1


@pytest.mark.usefixtures("watch", "inductor")
def test_strict_makes_every_fallback_an_error() -> None:
    cases = [
        (Attend().train().requires_grad_(False), "training mode"),
        (Attend().eval(), "gradients"),
        (relu, "nothing of a transformer"),
    ]
    for target, reason in cases:
        torch._dynamo.reset()
        compiled = torch.compile(target, backend="infercomp", options={"strict": True})
        with pytest.raises(UnsupportedError, match=reason) as caught:
            compiled(HIDDEN)
        assert type(caught.value) is UnsupportedError and caught.value.remedy


@pytest.mark.slow
@pytest.mark.usefixtures("watch")
def test_inductor_itself_trains_the_model() -> None:
    """The real fallback: its gradients are those of eager mode."""
    eager = Attend().eval()
    model = copy.deepcopy(eager)
    with pytest.warns(FallbackWarning):
        torch.compile(model, backend="infercomp")(HIDDEN).square().sum().backward()
    eager(HIDDEN).square().sum().backward()
    torch.testing.assert_close(model.projection.weight.grad, eager.projection.weight.grad)


# ---------------------------------------------------------------- weights


def test_layers_that_share_a_graph_use_their_own_weights(watch: Watch) -> None:
    model = LLAMA.build("sdpa")
    for layer in model.model.layers:
        layer.compile(backend="infercomp")
    for seed in (1, 2):
        assert_right(run(model, seed=seed), LLAMA.build("sdpa"), seed=seed)
    assert watch.num_calls <= len(model.model.layers)
    assert all(report.matches_of("merge_linears") == 2 for report in watch.reports)


def test_equal_modules_in_turn(watch: Watch) -> None:
    """Two models of one structure through one compiled function: each call uses the weights that it is given."""

    def call(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=input_ids, use_cache=False).logits

    models = [LLAMA.build("sdpa", seed=seed) for seed in (0, 1)]
    compiled = torch.compile(call, backend="infercomp")
    ids = LLAMA.example_inputs()["input_ids"]
    for index in (0, 1, 0, 1):
        with torch.inference_mode():
            found = compiled(models[index], ids)
        assert_right(found, LLAMA.build("sdpa", seed=index))
    assert 1 <= watch.num_calls <= 2


@torch.no_grad()
def scale_some(model: nn.Module) -> None:
    model.model.layers[0].mlp.gate_proj.weight.mul_(1.5)  # merged with up_proj
    model.model.layers[1].self_attn.k_proj.weight[0].zero_()  # merged with q_proj and v_proj
    model.model.layers[1].self_attn.o_proj.weight.mul_(-1)
    model.model.norm.weight.add_(0.5)


def test_updates_of_weights_are_seen(watch: Watch) -> None:
    model, uncompiled = LLAMA.build("sdpa"), LLAMA.build("sdpa")
    compiled = torch.compile(model, backend="infercomp")
    before = run(compiled)
    for each in (model, uncompiled):
        scale_some(each)
    changed = run(compiled)
    assert_right(changed, uncompiled)
    assert float((changed - before).abs().max()) > 0.1
    other = LLAMA.build("sdpa", seed=5)
    model.load_state_dict(other.state_dict())
    assert_right(run(compiled), other)
    model.load_state_dict(LLAMA.build("sdpa", seed=6).state_dict(), assign=True)
    assert_right(run(compiled), LLAMA.build("sdpa", seed=6))
    assert watch.num_calls <= 2


def test_a_parameter_given_other_data_is_seen(watch: Watch) -> None:
    model, uncompiled = LLAMA.build("sdpa"), LLAMA.build("sdpa")
    compiled = torch.compile(model, backend="infercomp")
    run(compiled)
    for each in (model, uncompiled):
        for linear in (each.model.layers[0].mlp.up_proj, each.model.layers[0].self_attn.o_proj):
            linear.weight.data = linear.weight.data * 0.5
    assert_right(run(compiled), uncompiled)
    assert watch.num_calls <= 2


def test_a_change_of_dtype_after_compiling(watch: Watch) -> None:
    model = LLAMA.build("sdpa")
    compiled = torch.compile(model, backend="infercomp")
    run(compiled)
    model.to(torch.bfloat16)
    uncompiled = LLAMA.build("sdpa").to(torch.bfloat16)
    found = run(compiled)
    assert found.dtype == torch.bfloat16
    assert_right(found, uncompiled)
    assert watch.num_calls == 2


@pytest.mark.usefixtures("watch")
def test_merged_weights_are_no_second_copy() -> None:
    model = LLAMA.build("sdpa")
    run(torch.compile(model, backend="infercomp"))
    layer = model.model.layers[0]
    groups = [
        [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj],
        [layer.mlp.gate_proj, layer.mlp.up_proj],
    ]
    for group in groups:
        storages = {linear.weight.untyped_storage().data_ptr() for linear in group}
        assert len(storages) == 1
        merged = group[0].weight.untyped_storage()
        assert merged.nbytes() == sum(linear.weight.numel() * 4 for linear in group)
    parameters = list(model.parameters())
    unique = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in parameters}
    assert sum(unique.values()) == sum(each.numel() * each.element_size() for each in parameters)


@pytest.mark.usefixtures("watch")
def test_a_compiled_model_is_saved_and_trained_as_before(tmp_path: Path) -> None:
    """State, checkpoint and autograd do not notice that some parameters now share one storage."""
    import transformers

    model, uncompiled = LLAMA.build("sdpa"), LLAMA.build("sdpa")
    run(torch.compile(model, backend="infercomp"))
    expected = uncompiled.state_dict()
    found = model.state_dict()
    assert list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    for each in (model, uncompiled):
        each.requires_grad_(True)
        each(**LLAMA.example_inputs()).logits.square().mean().backward()
    for one, other in zip(model.parameters(), uncompiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.usefixtures("watch")
def test_copies_stand_alone() -> None:
    """A deep copy of a compiled model has weights of its own."""
    model = LLAMA.build("sdpa")
    compiled = torch.compile(model, backend="infercomp")
    expected = run(compiled)
    scale_some(copy.deepcopy(model))
    assert torch.equal(run(compiled), expected)


# ---------------------------------------------------------------- verification


def double_scale(model_graph: ModelGraph, context: PassContext) -> None:
    """A planted bug: every attention with twice its scale."""
    for node in model_graph.calls(attention.overload):
        site = context.claim(node)
        if site is None:
            continue
        with model_graph.inserting_before(node) as emit:
            options = {**node.kwargs, "scale": node.kwargs["scale"] * 2}
            context.replace(site, node, emit(attention, *node.args, **options))
    model_graph.eliminate_dead_code()


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> str:
    bug = Pass("fuse_twice", double_scale, after=("recognize_attention",))
    place = [each.name for each in PIPELINE].index("recognize_attention") + 1
    pipeline = (*PIPELINE[:place], bug, *PIPELINE[place:])

    def run_planted(*arguments: Any, **options: Any) -> Any:
        return run_pipeline(*arguments, **{**options, "pipeline": pipeline})

    monkeypatch.setattr(compiler, "run_pipeline", run_planted)
    return bug.name


@pytest.mark.usefixtures("watch")
def test_verify_blames_the_pass_and_the_site(planted: str) -> None:
    compiled = torch.compile(LLAMA.build("sdpa"), backend="infercomp", options={"verify": True})
    with pytest.raises(VerificationError) as caught:
        run(compiled)
    error = caught.value
    assert type(error) is VerificationError and isinstance(error, InfercompError)
    assert (error.pass_name, error.site) == (planted, f"{planted}#0")
    assert error.where is not None and ".py:" in error.where
    torch._dynamo.reset()
    silent = torch.compile(LLAMA.build("sdpa"), backend="infercomp", options={"verify": True, "disable": [planted]})
    assert_right(run(silent), LLAMA.build("sdpa"))


@pytest.mark.usefixtures("watch")
def test_unverified_the_planted_bug_is_caught_by_the_numbers(planted: str) -> None:
    compiled = torch.compile(LLAMA.build("sdpa"), backend="infercomp")
    with pytest.raises(AssertionError, match="twice eager"):
        assert_right(run(compiled), LLAMA.build("sdpa"))


def test_every_pass_declares_a_class_that_verification_bounds() -> None:
    # The only passes that may move the numbers are those that the user has to ask for.
    moving = [each.name for each in PIPELINE if each.numeric_class.bound > 1e-9]
    assert moving == ["convert_attention", "sparsify_linears", "round_weights", "quantize_linears", "quantize_kv_cache"]
    assert len({each.name for each in PIPELINE}) == len(PIPELINE)
