"""What is built is found again by all that it depends on, and by nothing else."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from infercomp.codegen.config import CodegenConfig
from infercomp.codegen.cpp import toolchain
from infercomp.runtime.errors import BuildError


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    """The compiler is asked anew, and again after a test that changed where it is."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    toolchain.compiler.cache_clear()
    toolchain._told.cache_clear()


def test_a_terminal_s_width_builds_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """GCC breaks the lines of its help by the width."""
    keys = set()
    for width in ("40", "80", "160"):
        monkeypatch.setenv("COLUMNS", width)
        _forget()
        keys.add(toolchain.fingerprint(("text",), CodegenConfig()))
    assert len(keys) == 1


def test_texts_and_instruction_sets_have_keys_of_their_own() -> None:
    cases = [(text, CodegenConfig(instruction_set=name)) for text in "ab" for name in toolchain.INSTRUCTION_SETS]
    assert len({toolchain.fingerprint((text,), config) for text, config in cases}) == len(cases)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of x86")
def test_processors_that_one_flag_stands_for_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """-march=native is the same flag on every machine, and another processor on each."""
    keys = set()
    for processor in ("haswell", "skylake-avx512"):
        machine = tmp_path / processor
        machine.write_text(f'#!/bin/sh\nexec {toolchain.compiler()} "$@" -march={processor}\n')
        machine.chmod(0o755)
        monkeypatch.setenv("CXX", str(machine))
        _forget()
        keys.add(toolchain.fingerprint(("text",), CodegenConfig()))
        monkeypatch.delenv("CXX")
        _forget()
    assert len(keys) == 2


def test_a_compiler_that_fails_is_a_typed_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho out of order >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(BuildError, match="out of order") as caught:
        toolchain.fingerprint(("text",), CodegenConfig())
    assert caught.value.remedy is not None and "CXX" in caught.value.remedy
