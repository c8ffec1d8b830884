"""What specs share: arguments, launch options, and where a kernel came from."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import KernelSpecError

# The names of dtypes in Triton's signatures, and what `tl.` calls them.
FLOAT_DTYPES = {"fp32": "tl.float32", "fp16": "tl.float16", "bf16": "tl.bfloat16"}
INTEGER_DTYPES = {"i8": "tl.int8", "u8": "tl.uint8", "i1": "tl.int1", "i32": "tl.int32", "i64": "tl.int64"}
DTYPES = FLOAT_DTYPES | INTEGER_DTYPES

# What torch gives every tensor, and what wide loads need.
POINTER_ALIGNMENT_BYTES = 16

# Every launch is a grid of up to three axes.
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Argument:
    """A kernel argument: ``type`` is Triton's, as ``*fp16`` for a pointer or ``i32`` for a number.

    The value is a multiple of ``multiple``: kernels are compiled for that, and a launch has to see to it.
    """

    name: str
    type: str
    multiple: int = 1

    @property
    def is_pointer(self) -> bool:
        return self.type.startswith("*")

    @property
    def signature(self) -> str:
        """The type, and after a colon what the value is a multiple of (bytes for a pointer)."""
        multiple = POINTER_ALIGNMENT_BYTES if self.is_pointer else self.multiple
        return f"{self.type}:{multiple}" if multiple > 1 else self.type


@dataclass(frozen=True)
class Origin:
    """Where a kernel came from, for the header of its text; it does not tell kernels apart."""

    op: str = ""
    pass_name: str = ""
    nodes: tuple[str, ...] = ()
    source_lines: tuple[str, ...] = ()


UNKNOWN_ORIGIN = Origin()


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """Base of all specs. Equal specs (their origins aside) give kernels that do the same."""

    num_warps: int = 4
    num_stages: int = 2
    origin: Origin = field(default=UNKNOWN_ORIGIN, compare=False)

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise ``KernelSpecError`` for what the family cannot do."""

    @property
    def allows_contraction(self) -> bool:
        """Whether a product and a sum may become one fused multiply-add; False where results are held to the bit."""
        return True

    @property
    def name(self) -> str:
        """The kernel function's name."""
        raise NotImplementedError

    def arguments(self) -> tuple[Argument, ...]:
        """The kernel's arguments in order, outputs first."""
        raise NotImplementedError


def power_of_two_at_least(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def require(condition: bool, what: str, *, field: str, remedy: str = "choose another value or another family") -> None:
    if not condition:
        raise KernelSpecError(what, field=field, remedy=remedy)


def require_power_of_two(value: int, field: str, smallest: int = 1) -> None:
    is_power = value >= smallest and value & (value - 1) == 0
    require(is_power, f"{field} is {value}, not a power of two of at least {smallest}", field=field)


def require_dtype(dtype: str, field: str, allowed: dict[str, str] = FLOAT_DTYPES) -> None:
    require(dtype in allowed, f"{field} is {dtype!r}, not one of {', '.join(allowed)}", field=field)


def ceiling_division(count: int, size: int) -> int:
    return -(-count // size)
