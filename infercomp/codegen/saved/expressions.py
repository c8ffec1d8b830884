"""Expressions of sizes, checked before they are evaluated as Python."""

from __future__ import annotations

import ast
import re

_SIZE = re.compile(r"s\d+")
_FUNCTIONS = {"Max", "max", "min"}
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.USub)


def check_expression(text: str) -> None:
    """Raise ValueError unless ``text`` is integer arithmetic over sizes ``s0``, ``s1`` … and nothing else."""
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text[:60]!r} is no expression") from error
    if not _is_arithmetic(tree):
        raise ValueError(f"{text[:60]!r} is no integer arithmetic over sizes")


def _is_arithmetic(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=bool()):
            return False
        case ast.Constant(value=int()):
            return True
        case ast.Name(id=name):
            return _SIZE.fullmatch(name) is not None
        case ast.BinOp(left=left, op=operation, right=right):
            return isinstance(operation, _OPERATORS) and _is_arithmetic(left) and _is_arithmetic(right)
        case ast.UnaryOp(op=operation, operand=operand):
            return isinstance(operation, _OPERATORS) and _is_arithmetic(operand)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            return name in _FUNCTIONS and all(map(_is_arithmetic, arguments))
    return False
