"""The documents say what the code says: the passes, the options, the links."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import infercomp
from infercomp.config import option_types
from infercomp.passes.pipeline import pass_names

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
PUBLIC_NAME = re.compile(r"\binfercomp\.([A-Z]\w+|explain)\b")


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", REPOSITORY / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_passes_are_up_to_date(generate: ModuleType) -> None:
    assert generate.main(["--check"]) == 0, "run python docs/generate.py"


def test_a_changed_docstring_is_noticed(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "passes.md"
    target.write_text(generate.TARGET.read_text().replace("## normalize", "## normalise"))
    monkeypatch.setattr(generate, "TARGET", target)
    assert generate.main(["--check"]) == 1
    assert "out of date" in capsys.readouterr().err
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0


def test_a_changed_figure_is_noticed(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "quantization.md"
    target.write_text(generate.QUANTIZATION.read_text().replace("| `w8a16` | 8.", "| `w8a16` | 7."))
    monkeypatch.setattr(generate, "QUANTIZATION", target)
    assert generate.main(["--check"]) == 1
    assert "quantization.md is out of date" in capsys.readouterr().err
    assert generate.main([]) == 0
    assert target.read_text() == (REPOSITORY / "docs" / "quantization.md").read_text()


def test_the_table_of_families_is_kept_and_has_every_pass(generate: ModuleType) -> None:
    _, families = generate.split(generate.TARGET.read_text())
    (header,) = (line for line in families.splitlines() if line.startswith("| family |"))
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    assert columns[2:] == [name.replace("_", " ") for name in pass_names()]


def test_attention_is_recognised_in_every_layer_of_every_family(generate: ModuleType) -> None:
    _, text = generate.split(generate.TARGET.read_text())
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    header, _, *rows = rows
    families = generate._load_families().FAMILIES
    assert {(row[0], row[1]) for row in rows} == {
        (family.name, attention) for family in families.values() for attention in family.attn_implementations
    }
    column = header.index("recognize attention")
    for row in rows:
        assert int(row[column]) == families[row[0]].num_attention_layers, row


def test_readme_has_every_option() -> None:
    text = (REPOSITORY / "README.md").read_text()
    table = re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)
    assert sorted(table) == sorted(option_types())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_names_exist(document: Path) -> None:
    text = document.read_text()
    for target in LINK.findall(text):
        assert (document.parent / target).exists(), target
    for name in PUBLIC_NAME.findall(text):
        assert hasattr(infercomp, name), name


def test_every_public_error_is_explained() -> None:
    text = (REPOSITORY / "docs" / "debugging.md").read_text()
    for name in infercomp.__all__:
        if name.endswith("Error"):
            assert name in text
