"""Choosing tiles needs no GPU: seconds are given by the tests."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from codegen.triton.representative_specs import EVERY, MATMULS, PAGED

from infercomp.codegen.triton import KernelCompileError
from infercomp.codegen.triton.autotune import Autotuner, shape_class
from infercomp.codegen.triton.candidates import candidates, tuning_of
from infercomp.codegen.triton.chip import A100, CHIPS, H100, MI300X, Chip
from infercomp.codegen.triton.cost import estimated_seconds, fits, shared_bytes
from infercomp.codegen.triton.specs import KernelSpec, Origin

SPEC = MATMULS["matmul"]


class Stopwatch:
    """Measures by a formula and remembers what it was asked."""

    def __init__(self, favourite_rows: int) -> None:
        self.asked: list[KernelSpec] = []
        self.favourite_rows = favourite_rows

    def __call__(self, spec: KernelSpec) -> float:
        self.asked.append(spec)
        return abs(getattr(spec, "tile_rows", 0) - self.favourite_rows) + 1.0


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
@pytest.mark.parametrize("name", EVERY)
def test_candidates_fit_are_few_and_always_the_same(name: str, chip: Chip) -> None:
    forms = candidates(EVERY[name], chip, 512, 4096)
    assert 1 <= len(forms) <= 8 and forms == candidates(EVERY[name], chip, 512, 4096)
    assert all(fits(form, chip) for form in forms) or forms == [EVERY[name]]
    assert chip.has_tensor_memory_access or not any(tuning_of(form).get("use_descriptors") for form in forms)


def test_few_rows_get_low_tiles_and_many_rows_high_ones() -> None:
    assert candidates(SPEC, H100, 16)[0].tile_rows == 16
    assert candidates(SPEC, H100, 8192)[0].tile_rows >= 128


def test_a_product_with_few_tiles_splits_its_inner_dimension() -> None:
    narrow = replace(SPEC, num_columns=512, num_inner=16384)
    assert candidates(narrow, H100, 16)[0].num_splits > 1


def test_small_shared_memory_excludes_large_tiles() -> None:
    big = replace(SPEC, tile_columns=256, num_stages=4)
    assert fits(big, H100) and not fits(big, MI300X) and shared_bytes(big) > MI300X.shared_bytes_per_program


def test_more_work_takes_longer() -> None:
    for spec in (SPEC, MATMULS["matmul_split"], PAGED["paged_decode"], PAGED["paged_prefill"]):
        times = [estimated_seconds(spec, A100, rows, 8192) for rows in (64, 4096, 65536)]
        assert times == sorted(times) and times[0] < times[-1]


def test_the_fastest_is_chosen_and_measured_once(tmp_path: Path) -> None:
    path, stopwatch = tmp_path / "cache" / "tuning.json", Stopwatch(favourite_rows=64)
    chosen = Autotuner(path, H100, stopwatch).choose(SPEC, 512)
    num_asked = len(stopwatch.asked)
    assert chosen == min(stopwatch.asked, key=Stopwatch(64)) and num_asked == len(candidates(SPEC, H100, 512))
    again = Autotuner(path, H100, stopwatch)
    assert again.choose(replace(SPEC, origin=Origin(op="other")), 512) == chosen
    assert len(stopwatch.asked) == num_asked
    assert again.choose(SPEC, 16) is not None and len(stopwatch.asked) > num_asked


def test_chips_and_shape_classes_do_not_share_entries(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    for chip in (H100, A100):
        for rows in (16, 2048):
            Autotuner(path, chip, Stopwatch(64)).choose(SPEC, rows)
    chips = json.loads(path.read_text())["chips"]
    assert {name: len(entries) for name, entries in chips.items()} == {"H100": 2, "A100": 2}
    assert [each.name for each in tmp_path.iterdir()] == ["tuning.json"]


def test_a_shape_class_is_all_but_what_is_tuned() -> None:
    key = shape_class(SPEC, 16)
    assert key == shape_class(replace(SPEC, tile_rows=64, num_stages=2, origin=Origin()), 16)
    assert key != shape_class(replace(SPEC, num_columns=4097), 16)
    assert key != shape_class(SPEC, 32)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 0, "chips": {"H100": {}}}'])
def test_a_file_that_cannot_be_used_is_measured_anew(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(content)
    Autotuner(path, H100, Stopwatch(64)).choose(SPEC, 16)
    assert json.loads(path.read_text())["chips"]["H100"]


def test_an_entry_with_an_unknown_field_is_measured_anew(tmp_path: Path) -> None:
    path, key = tmp_path / "tuning.json", shape_class(SPEC, 16)
    path.write_text(json.dumps({"version": 1, "chips": {"H100": {key: {"tile_planets": 3}}}}))
    stopwatch = Stopwatch(64)
    Autotuner(path, H100, stopwatch).choose(SPEC, 16)
    assert stopwatch.asked


def test_without_a_measure_the_cost_model_decides_and_nothing_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    assert Autotuner(path, H100).choose(SPEC, 16) == candidates(SPEC, H100, 16)[0]
    assert not path.exists()


def test_what_does_not_compile_is_passed_over_until_nothing_is_left(tmp_path: Path) -> None:
    def refuse_low(spec: KernelSpec) -> float:
        if getattr(spec, "num_splits", 1) > 1:
            raise KernelCompileError("no", target="cuda:90")
        return 1.0

    assert Autotuner(tmp_path / "a.json", H100, refuse_low).choose(SPEC, 16).num_splits == 1
    with pytest.raises(KernelCompileError, match="none of"):
        Autotuner(tmp_path / "b.json", H100, lambda _: float("inf")).choose(SPEC, 16)
