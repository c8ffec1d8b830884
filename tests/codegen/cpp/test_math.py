"""The elementary functions of math.h against float64, over all exponents and the values around their seams."""

from __future__ import annotations

import ctypes
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import infercomp.codegen.cpp
from infercomp.codegen.cpp.toolchain import BITS_OF_SUMS

SUPPORT = Path(infercomp.codegen.cpp.__file__).parent / "support"

HARNESS = """
#include "math.h"

using namespace infercomp;

#define LOOP(NAME) \\
    extern "C" void NAME##_loop(const float* x, float* y, long n) { \\
        _Pragma("omp simd") for (long i = 0; i < n; ++i) y[i] = math::NAME(x[i]); \\
    }
#define LANES(NAME) \\
    extern "C" void NAME##_lanes(const float* x, float* y, long n) { \\
        for (long i = 0; i + 16 <= n; i += 16) store(y + i, math::NAME(load<f32x16>(x + i))); \\
    }
#define BOTH(NAME) LOOP(NAME) LANES(NAME)

BOTH(exp) BOTH(exp2_nonpositive) BOTH(tanh) BOTH(erf) BOTH(sigmoid) BOTH(silu) BOTH(gelu) BOTH(gelu_tanh) BOTH(log)
LOOP(sqrt) LOOP(rsqrt) LOOP(sin) LOOP(cos)
extern "C" float pow_one(float x, float y) { return math::pow(x, y); }
"""

COMPILE = ["g++", "-std=c++17", "-O3", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", BITS_OF_SUMS]
COMPILE += ["-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-iquote", str(SUPPORT)]
VARIANTS = {"native": ["-march=native", "-mprefer-vector-width=512"]}
if platform.machine() == "x86_64":
    VARIANTS |= {"avx2": ["-mavx2", "-mfma", "-mtune=znver3"], "portable": []}


@dataclass(frozen=True)
class Function:
    exact: Callable[[Tensor], Tensor]  # in float64
    ulps: Callable[[Tensor], Tensor | float]  # how far off, for these arguments
    smallest: float = 1e-36  # results below may be 0
    has_lanes: bool = True


def gelu_tanh_argument(x: Tensor) -> Tensor:
    return (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)


def logistic(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


FUNCTIONS = {
    "exp": Function(torch.exp, lambda _: 2, smallest=2.0**-126),
    "exp2_nonpositive": Function(torch.exp2, lambda _: 2, smallest=2.0**-126),
    "tanh": Function(torch.tanh, lambda _: 3),
    "erf": Function(torch.erf, lambda _: 3),
    "sigmoid": Function(logistic, lambda _: 3),
    "silu": Function(lambda x: x * logistic(x), lambda _: 3),
    # erfc keeps the lower tail, where 1 + erf has no digit left.
    "gelu": Function(lambda x: x * torch.erfc(-x / 2**0.5) / 2, lambda x: torch.where(x < -5, 16, 6)),
    "gelu_tanh": Function(
        lambda x: x * logistic(2 * gelu_tanh_argument(x)), lambda x: 4 + 5 * gelu_tanh_argument(x).abs()
    ),
    "log": Function(torch.log, lambda _: 2),
    "sqrt": Function(torch.sqrt, lambda _: 0.5, has_lanes=False),
    "rsqrt": Function(torch.rsqrt, lambda _: 2, has_lanes=False),
    "sin": Function(torch.sin, lambda _: 2, has_lanes=False),
    "cos": Function(torch.cos, lambda _: 2, has_lanes=False),
}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    folder = tmp_path_factory.mktemp("math")
    (folder / "harness.cpp").write_text(HARNESS)
    for name, flags in VARIANTS.items():
        subprocess.run([*COMPILE, *flags, "-shared", "harness.cpp", "-o", f"{name}.so"], cwd=folder, check=True)
    return {name: ctypes.CDLL(str(folder / f"{name}.so")) for name in VARIANTS}


@pytest.fixture(scope="module", params=list(VARIANTS))
def library(request: pytest.FixtureRequest, libraries: dict[str, ctypes.CDLL]) -> ctypes.CDLL:
    return libraries[request.param]


@pytest.fixture(scope="module")
def arguments() -> Tensor:
    """Every sign and exponent with random mantissas, the dense middle, and the neighbours of special values."""
    generator = torch.Generator().manual_seed(0)
    words = torch.arange(0, 2**32, 2**14) + torch.randint(0, 2**14, (2**18,), generator=generator)
    middle = [torch.linspace(-limit, limit, 2**18) for limit in (1.5, 20, 110)]
    seams = torch.tensor([0.0, 0.6, 1.0, 4.0, 5.0, 14.5, 0.5**0.5, 2.0**0.5, 87.33654, 88.72283, 2.0**-126, 1e-45])
    seams = torch.cat([seams, -seams]).view(torch.int32)[:, None] + torch.arange(-50, 50, dtype=torch.int32)
    values = torch.cat([words.to(torch.int32).view(torch.float32), *middle, seams.flatten().view(torch.float32)])
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4028235e38, -3.4028235e38, 1e-45, -1e-45])
    values = torch.cat([values, special])
    return values[: len(values) // 16 * 16 - 7]  # a remainder for the loops


def evaluate(library: ctypes.CDLL, name: str, x: Tensor) -> Tensor:
    y = torch.full_like(x, 99.0)
    getattr(library, name)(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_long(len(x)))
    return y


def mistakes(function: Function, x: Tensor, y: Tensor, slack: float = 1.0) -> Tensor:
    """The arguments whose results are too far from exact."""
    exact = function.exact(x.double())
    rounded = exact.float()
    size = rounded.abs()
    ulp = (torch.nextafter(size, torch.tensor(torch.inf)).double() - size.double()).clamp(min=2.0**-149)
    close = (y.double() - exact).abs() <= slack * function.ulps(x.double()) * ulp
    is_small = exact.abs() < function.smallest
    close |= is_small & (y.abs() <= 2 * function.smallest)
    close |= (y == rounded) | (y.isnan() & rounded.isnan())
    return x[~close]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_is_within_its_bound(library: ctypes.CDLL, arguments: Tensor, name: str) -> None:
    x = -arguments.abs() if name == "exp2_nonpositive" else arguments
    wrong = mistakes(FUNCTIONS[name], x, evaluate(library, name + "_loop", x))
    assert not len(wrong), wrong[:10]


@pytest.mark.parametrize("name", [name for name, function in FUNCTIONS.items() if function.has_lanes])
def test_lanes_give_the_bits_of_the_loop(library: ctypes.CDLL, arguments: Tensor, name: str) -> None:
    count = len(arguments) // 16 * 16
    x = -arguments.abs() if name == "exp2_nonpositive" else arguments
    loop, lanes = evaluate(library, name + "_loop", x)[:count], evaluate(library, name + "_lanes", x)[:count]
    assert torch.equal(loop.nan_to_num(123).view(torch.int32), lanes.nan_to_num(123).view(torch.int32))


def test_special_values(library: ctypes.CDLL) -> None:
    inf, nan = torch.inf, torch.nan
    expected = {
        "exp": {-inf: 0.0, inf: inf, 0.0: 1.0, -200.0: 0.0, 89.0: inf, nan: nan},
        "exp2_nonpositive": {-inf: 0.0, 0.0: 1.0, -1.0: 0.5, -127.0: 0.0, -3.4e38: 0.0, nan: nan},
        "tanh": {-inf: -1.0, inf: 1.0, -0.0: -0.0, 20.0: 1.0, nan: nan},
        "erf": {-inf: -1.0, inf: 1.0, -0.0: -0.0, 5.0: 1.0, nan: nan},
        "sigmoid": {-inf: 0.0, inf: 1.0, 0.0: 0.5, nan: nan},
        "silu": {inf: inf, 0.0: 0.0, -200.0: -0.0, nan: nan},
        "gelu": {inf: inf, 0.0: 0.0, -200.0: -0.0, 30.0: 30.0, nan: nan},
        "gelu_tanh": {inf: inf, 0.0: 0.0, -200.0: -0.0, 1e30: 1e30, nan: nan},
        "log": {-0.0: -inf, inf: inf, -1.0: nan, -inf: nan, 1.0: 0.0, nan: nan},
        "rsqrt": {0.0: inf, inf: 0.0, -1.0: nan, 4.0: 0.5, nan: nan},
    }
    for name, cases in expected.items():
        x, y = torch.tensor(list(cases)), torch.tensor(list(cases.values()))
        actual = evaluate(library, name + "_loop", x)
        same = (actual == y) & (actual.signbit() == y.signbit()) | actual.isnan() & y.isnan()
        assert same.all(), (name, x[~same], actual[~same])


def test_pow_is_the_standard_one(library: ctypes.CDLL) -> None:
    library.pow_one.restype = ctypes.c_float
    assert library.pow_one(ctypes.c_float(1.5), ctypes.c_float(2)) == 2.25


def test_a_wrong_bound_is_caught(library: ctypes.CDLL, arguments: Tensor) -> None:
    """A function that errs by four times its bound in its last places does not pass."""
    for name in ("exp", "tanh", "erf", "gelu", "log"):
        function = FUNCTIONS[name]
        y = evaluate(library, name + "_loop", arguments)
        assert len(mistakes(function, arguments, (y.double() * (1 + 2.0**-20)).float()))
        assert len(mistakes(function, arguments, y, slack=0.1))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86 assembly")
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in ("sin", "cos")])
def test_loops_are_vectorised(tmp_path: Path, name: str) -> None:
    """No call, and no arithmetic on single floats in the AVX-512 loop."""
    source = HARNESS.split("BOTH(exp) ")[0] + f"LOOP({name})\n"
    flags = ["-march=skylake-avx512", "-mprefer-vector-width=512", "-S", "-o", "-"]
    text = subprocess.run(
        [*COMPILE, *flags, "-x", "c++", "-"], input=source, capture_output=True, text=True, check=True
    )
    body = text.stdout
    assert not re.search(r"\bcall\b", body)
    assert len(re.findall(r"v(?:add|sub|mul|div|sqrt|fn?m\w+)ps\s.*%zmm", body)) >= 1
