"""The reference of settings, out of the dataclasses of configs/."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import yaml

from configs.schema import RunConfig

_HEAD = """---
search:
  boost: 4  # before the classes that hold them
---

# Settings

Every setting of a training, with its type, its default and its meaning, made from the classes of `configs/`. A recipe
(`--config FILE`) is YAML with these sections; `--set section.name=value` changes one setting and may be given many
times. An unknown name is refused, and the nearest known one suggested. `train.output/config.yaml` holds all settings of
a run. Which of them may change when a run goes on: [Checkpoints](../checkpoint.md#what-may-change).
"""


class Setting(NamedTuple):
    """One field of a section."""

    name: str
    """section.field"""
    type: str
    default: str
    """As YAML has it."""
    text: str
    """Its docstring, on one line."""


def sections() -> dict[str, type]:
    """Name to dataclass, in the order of `RunConfig`."""
    hints = typing.get_type_hints(RunConfig)
    return {field.name: hints[field.name] for field in dataclasses.fields(RunConfig)}


def settings_of(section: str, of: type[Any]) -> Iterator[Setting]:
    """Its settings, in the order of the class."""
    texts = field_texts(of)
    hints = typing.get_type_hints(of)
    built = of()
    for field in dataclasses.fields(of):
        default = _yaml(getattr(built, field.name))
        yield Setting(f"{section}.{field.name}", type_text(hints[field.name]), default, texts.get(field.name, ""))


def all_settings() -> list[Setting]:
    """Of all sections."""
    return [setting for name, of in sections().items() for setting in settings_of(name, of)]


def field_texts(of: type) -> dict[str, str]:
    """The docstring below each field, on one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(of))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            text = ast.literal_eval(below.value)
            found[field.target.id] = " ".join(str(text).split())
    return found


def type_text(hint: Any) -> str:
    """As a reader of YAML calls it: `number`, `a list of texts`, one of some words."""
    if typing.get_origin(hint) is Literal:
        return " or ".join(f"`{_yaml(value)}`" for value in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"list of {type_text(typing.get_args(hint)[0])}s"
    names = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    if hint not in names:
        raise TypeError(f"expected a type that {sys.modules[__name__].__file__} can name, got {hint!r}")
    return names[hint]


def _yaml(value: Any) -> str:
    if isinstance(value, float) and value == int(value):
        return f"{value:.1f}"
    listed = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(listed, default_flow_style=True).removesuffix("...\n").strip().replace("''", '""')


def cell(text: str) -> str:
    """Text of a table's cell: no sign of it is taken for Markdown, but for code between backquotes."""
    parts = text.split("`")
    for place in range(0, len(parts), 2):
        for sign in "\\*_[]<":
            parts[place] = parts[place].replace(sign, f"\\{sign}")
    return "`".join(parts).replace("|", "\\|")


def page() -> str:
    """docs/reference/settings.md, as the site has it."""
    lines = [_HEAD]
    for name, of in sections().items():
        lines += [f"## `{name}`", "", cell(" ".join((inspect.getdoc(of) or "").split())), ""]
        lines += ["| setting | type | default | |", "|---|---|---|---|"]
        lines += [
            f"| `{each.name}`{{ #{each.name} }} | {each.type} | `{each.default}` | {cell(each.text)} |"
            for each in settings_of(name, of)
        ]
        lines.append("")
    return "\n".join(lines)
