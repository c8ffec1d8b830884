"""The rules about the tree itself; each is a function from a tree to its problems, and is shown a tree that breaks it.

A rule looks at the files that are there, so it holds from the first commit on.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import infercomp

REPOSITORY = Path(__file__).resolve().parents[1]
LARGEST_FILE_LINES = 450
SOURCE_FOLDERS = ("infercomp", "tests", "examples", "benchmarks")
NAMELESS_FILES = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
PASS_VERBS = ("recognize_", "fuse_", "merge_", "quantize_", "sparsify_", "page_")

# What each room may import of infercomp; the front door (all that is in no room) may import everything.
ROOMS = {
    "infercomp.passes": ("infercomp.passes", "infercomp.codegen", "infercomp.runtime"),
    "infercomp.codegen": ("infercomp.codegen", "infercomp.runtime"),
    "infercomp.runtime": ("infercomp.runtime",),
}
# The ledger is integers and deques: it can be tested on any machine, in microseconds.
MODULES_WITHOUT_TORCH = ("infercomp.runtime.request", "infercomp.runtime.block_pool", "infercomp.runtime.scheduler")


def imports_point_down(root: Path) -> Iterator[str]:
    for module, imported in imports(root):
        for room, allowed in ROOMS.items():
            is_above = is_inside(imported, "infercomp") and not any(is_inside(imported, each) for each in allowed)
            if is_inside(module, room) and is_above:
                yield f"{module} imports {imported}, which is above {room}"


def ledger_is_free_of_torch(root: Path) -> Iterator[str]:
    edges = list(imports(root))
    for start in MODULES_WITHOUT_TORCH:
        reached, pending = {start}, [start]
        while pending:
            module = pending.pop()
            for imported in {target for source, target in edges if source == module} - reached:
                reached.add(imported)
                pending.append(imported)
                if is_inside(imported, "torch"):
                    yield f"{start} reaches torch through {module}"


def each_pass_has_its_test(root: Path) -> Iterator[str]:
    for name in pass_names(root):
        if not (root / "tests" / "passes" / f"test_{name}.py").exists():
            yield f"infercomp/passes/{name}.py has no tests/passes/test_{name}.py"


def documentation_names_each_pass(root: Path) -> Iterator[str]:
    document = root / "docs" / "passes.md"
    if document.exists():
        text = document.read_text()
        yield from (f"docs/passes.md does not mention {name}" for name in pass_names(root) if name not in text)


def each_example_has_main(root: Path) -> Iterator[str]:
    for path in sorted((root / "examples").glob("*.py")):
        functions = {node.name for node in parse(path).body if isinstance(node, ast.FunctionDef)}
        if "main" not in functions:
            yield f"examples/{path.name} has no main()"


def files_are_named_for_what_they_hold(root: Path) -> Iterator[str]:
    yield from (f"{path.relative_to(root)} says nothing" for path in sources(root) if path.name in NAMELESS_FILES)


def files_are_small(root: Path) -> Iterator[str]:
    for path in sources(root):
        num_lines = len(path.read_text().splitlines())
        if num_lines > LARGEST_FILE_LINES:
            yield f"{path.relative_to(root)} has {num_lines} lines, more than {LARGEST_FILE_LINES}"


def sources(root: Path) -> Iterator[Path]:
    for folder in SOURCE_FOLDERS:
        yield from sorted((root / folder).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imports(root: Path) -> Iterator[tuple[str, str]]:
    """Pairs of a module of infercomp and a name that it imports anywhere in its text, both dotted and absolute."""
    for path in sorted((root / "infercomp").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        package = parts[:-1]
        module = ".".join(package if parts[-1] == "__init__" else parts)
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Import):
                yield from ((module, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                prefix = package[: len(package) - node.level + 1] if node.level else ()
                base = ".".join([*prefix, *([node.module] if node.module else [])])
                yield from ((module, name) for name in imported_names(root, base, node))


def imported_names(root: Path, base: str, node: ast.ImportFrom) -> Iterator[str]:
    """What `from base import …` loads: the submodules among its names, else the base itself."""
    folder = root.joinpath(*base.split("."))
    for alias in node.names:
        is_submodule = (folder / f"{alias.name}.py").exists() or (folder / alias.name / "__init__.py").exists()
        yield f"{base}.{alias.name}" if is_submodule else base


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def pass_names(root: Path) -> list[str]:
    return [path.stem for path in sorted((root / "infercomp" / "passes").glob("*.py")) if defines_pass(path)]


def defines_pass(path: Path) -> bool:
    """Whether the file is named as a pass is, or has `Pass(…)`, `class …(Pass)` or `@….…pass` at its top level."""
    if path.stem.startswith(PASS_VERBS):
        return True
    makers: list[ast.expr] = []
    for node in parse(path).body:
        if isinstance(node, ast.ClassDef):
            makers += [*node.bases, *node.decorator_list]
        elif isinstance(node, ast.FunctionDef):
            makers += node.decorator_list
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Call):
            makers.append(node.value)
    return any(last_word(maker) in ("Pass", "graph_pass", "register_pass") for maker in makers)


def last_word(expression: ast.expr) -> str:
    if isinstance(expression, ast.Call):
        return last_word(expression.func)
    if isinstance(expression, ast.Attribute):
        return expression.attr
    return expression.id if isinstance(expression, ast.Name) else ""


Rule = Callable[[Path], Iterator[str]]
BROKEN_TREES: list[tuple[Rule, dict[str, str]]] = [
    (imports_point_down, {"infercomp/runtime/a.py": "from infercomp.passes import config"}),
    (imports_point_down, {"infercomp/runtime/a.py": "def f():\n    import infercomp.llm"}),
    (imports_point_down, {"infercomp/codegen/ops/a.py": "from ...passes.config import PassConfig"}),
    (imports_point_down, {"infercomp/passes/a.py": "from .. import llm", "infercomp/llm.py": ""}),
    (imports_point_down, {"infercomp/passes/a.py": "from infercomp import __version__"}),
    (ledger_is_free_of_torch, {"infercomp/runtime/scheduler.py": "import torch.nn"}),
    (
        ledger_is_free_of_torch,
        {
            "infercomp/runtime/request.py": "from .step import X",
            "infercomp/runtime/step.py": "from torch import Tensor",
        },
    ),
    (each_pass_has_its_test, {"infercomp/passes/fuse_mlp.py": ""}),
    (each_pass_has_its_test, {"infercomp/passes/tidy.py": "PASS = frame.Pass(name='tidy')"}),
    (each_pass_has_its_test, {"infercomp/passes/tidy.py": "class Tidy(Pass): ..."}),
    (documentation_names_each_pass, {"infercomp/passes/fuse_mlp.py": "", "docs/passes.md": "nothing yet"}),
    (each_example_has_main, {"examples/first.py": "def other(): ..."}),
    (files_are_named_for_what_they_hold, {"tests/runtime/utils.py": ""}),
    (files_are_small, {"infercomp/llm.py": "x = 1\n" * (LARGEST_FILE_LINES + 1)}),
]
RULES = list(dict.fromkeys(rule for rule, _ in BROKEN_TREES))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps(rule: Rule) -> None:
    assert list(rule(REPOSITORY)) == []


@pytest.mark.parametrize(("rule", "files"), BROKEN_TREES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_tree_is_noticed(rule: Rule, files: dict[str, str], tmp_path: Path) -> None:
    assert list(rule(tmp_path)) == []
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert len(list(rule(tmp_path))) == 1


def test_a_file_without_a_pass_needs_no_test(tmp_path: Path) -> None:
    (tmp_path / "infercomp" / "passes").mkdir(parents=True)
    (tmp_path / "infercomp" / "passes" / "frame.py").write_text("class Pass: ...\nclass PassConfig: ...\nRUN = f(1)\n")
    assert pass_names(tmp_path) == []


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_infercomp_loads_neither_torch_nor_transformers() -> None:
    loaded = "import infercomp, sys; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert run_python(loaded) == "[]"


@pytest.mark.parametrize("name", ["ConfigError", "SamplingParams", "Config"])
def test_public_names_are_loaded_on_use(name: str) -> None:
    assert run_python(f"import infercomp; print(infercomp.{name}.__name__)") == name


def test_a_submodule_does_not_take_the_place_of_a_public_name() -> None:
    code = "import infercomp, types; infercomp.explain = types.ModuleType('m'); print('explain' in vars(infercomp))"
    assert run_python(code) == "False"


def test_public_names_are_those_that_static_tools_see() -> None:
    seen = {}
    for node in ast.walk(parse(REPOSITORY / "infercomp" / "__init__.py")):
        if isinstance(node, ast.ImportFrom) and is_inside(node.module or "", "infercomp"):
            seen |= {alias.name: node.module for alias in node.names}
    assert seen == infercomp._MODULE_OF
