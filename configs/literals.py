"""Settings of a Python file that assigns plain values to `config.…`, read without running it.

The file is parsed, and of its syntax only this is known: the import of easydict, `config = edict()`, and
`config.key = value`, where a value is a number, a text, True, False, None, a tuple or list of values, +, -, *, / and //
of numbers, or a key that was set above. All else is refused by its line: calls, imports, names, subscripts, powers.
"""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from configs.schema import ConfigError

Value = None | bool | int | float | str | tuple["Value", ...]

_MOST_BYTES = 1 << 14
"""Of a file: arcface_torch's have seven hundred, and a parser takes stack by the length of what it reads."""
_DEPTH = 16
_ITEMS = 64
_BITS = 64
_ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


class Setting(NamedTuple):
    value: Value
    line: int


def read_settings(path: Path) -> dict[str, Setting]:
    """Values of `config.…` by key, a later assignment over an earlier one.

    Raises ConfigError, one line that names file and line, for all that is not as above: nothing of it is ever run.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read it ({error.strerror})") from None
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"{path}: expected settings in at most {_MOST_BYTES} bytes, got more")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parser's on odd escapes
            tree = ast.parse(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except SyntaxError as error:
        raise ConfigError(f"{path}:{error.lineno or 1}: not Python ({error.msg:.100})") from None
    except (ValueError, RecursionError, MemoryError):
        raise ConfigError(f"{path}: not Python that can be read (null bytes, or nested too deeply)") from None
    reader = _Reader(path)
    for statement in tree.body:
        reader.take(statement)
    return reader.settings


class _Reader:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.settings: dict[str, Setting] = {}

    def take(self, statement: ast.stmt) -> None:
        match statement:
            case ast.ImportFrom(module="easydict", level=0) | ast.Import(names=[ast.alias(name="easydict")]):
                pass
            case ast.Expr(value=ast.Constant(value=str())):
                pass
            case ast.Assign(
                targets=[ast.Name(id="config")],
                value=ast.Call(func=ast.Name(id="edict" | "EasyDict"), args=[], keywords=[]),
            ):
                pass
            case ast.Assign(targets=[ast.Attribute(value=ast.Name(id="config"), attr=key)], value=value):
                self.settings[key] = Setting(self._value(value, _DEPTH), statement.lineno)
            case _:
                raise self._unknown(statement)

    def _value(self, node: ast.expr, depth: int) -> Value:
        match node:
            case _ if depth == 0:
                raise self._error(node, f"expected values nested at most {_DEPTH} deep, got more")
            case ast.Constant(value=bool() | str() | None as value):
                return value
            case ast.Constant(value=int() | float() as value):
                return self._number(node, value)
            case ast.Tuple(elts=items) | ast.List(elts=items):
                if len(items) > _ITEMS:
                    raise self._error(node, f"expected at most {_ITEMS} values, got {len(items)}")
                return tuple(self._value(item, depth - 1) for item in items)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._operand(operand, depth - 1)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                one, other = self._operand(left, depth - 1), self._operand(right, depth - 1)
                try:
                    return self._number(node, _ARITHMETIC[type(op)](one, other))
                except ArithmeticError as error:
                    raise self._error(node, f"cannot compute it ({error})") from None
            case ast.Attribute(value=ast.Name(id="config"), attr=key):
                if key not in self.settings:
                    raise self._error(node, f"config.{_short(key)} is read before it is set")
                return self.settings[key].value
            case _:
                raise self._unknown(node)

    def _operand(self, node: ast.expr, depth: int) -> float:
        value = self._value(node, depth)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._error(node, "expected a number in arithmetic")
        return value

    def _number(self, node: ast.expr, value: float) -> float:
        if (isinstance(value, int) and value.bit_length() > _BITS) or not math.isfinite(value):
            raise self._error(node, f"expected a finite number of at most {_BITS} bits")
        return value

    def _unknown(self, node: ast.stmt | ast.expr) -> ConfigError:
        what = type(node.value if isinstance(node, ast.Expr) else node).__name__
        return self._error(
            node,
            f"expected `config.key = value` with a plain value, found {what}: write the value itself (no file is run "
            "here)",
        )

    def _error(self, node: ast.stmt | ast.expr, message: str) -> ConfigError:
        return ConfigError(f"{self._path}:{node.lineno}: {message}")


def _short(name: str) -> str:
    return name if len(name) <= 80 else f"{name[:80]}…"
