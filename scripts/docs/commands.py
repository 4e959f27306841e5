"""The reference of command lines, out of their argparse parsers."""

from __future__ import annotations

import argparse
import importlib
import os
import re
from collections.abc import Iterator
from typing import Any, NoReturn
from unittest import mock

from scripts.docs.settings import cell

PROGRAMS = {
    "train_dist.py": ("train_dist", "parse"),
    "python -m data": ("data.__main__", "main"),
    "python -m training": ("training.__main__", "main"),
    "python -m evaluation": ("evaluation.__main__", "main"),
    "python -m clustering": ("clustering.__main__", "main"),
    "python -m configs": ("configs.__main__", "main"),
    "python -m training.demo": ("training.demo", "main"),
}
"""Command to the module and function that build its parser and read the arguments."""
Command = tuple[str, str, argparse.ArgumentParser]
"""Whole command, help, parser."""
_OF_THIS_HOST = re.compile(r"default \S+ here")
_HEAD = """# Command line

Every command and option, made from the parsers; `--help` prints the same. Commands are given with the environment
active (`. .venv/bin/activate`), or as `.venv/bin/python …`. Exit code 0: done; 1: a check found something; 2:
arguments, settings or data are not as expected, and one line says what; 130: interrupted. Those of a training stand in
the [operating guide](../operating.md#start).
"""


class _Built(BaseException):
    """Carries a parser out of the function that built it."""


def parser_of(program: str) -> argparse.ArgumentParser:
    """The parser of one of `PROGRAMS`; the program does nothing else."""
    module, function = PROGRAMS[program]
    found: list[argparse.ArgumentParser] = []

    def catch(self: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        found.append(self)
        raise _Built

    with mock.patch.object(argparse.ArgumentParser, "parse_args", catch):
        try:
            getattr(importlib.import_module(module), function)([])
        except _Built:
            return found[0]
    raise RuntimeError(f"{module}.{function} reads no arguments")


def subcommands(parser: argparse.ArgumentParser) -> Iterator[Command]:
    """Name, help and parser of each."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, sub in action.choices.items():
                yield name, helps.get(name, ""), sub


def all_commands(program: str) -> Iterator[Command]:
    """Whole command, help and parser: the program itself, then every subcommand, those of subcommands too."""

    def walk(name: str, about: str, parser: argparse.ArgumentParser) -> Iterator[Command]:
        yield name, about, parser
        for below, text, sub in subcommands(parser):
            yield from walk(f"{name} {below}", text, sub)

    yield from walk(program, "", parser_of(program))


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """All that begin with -."""
    return {option for action in parser._actions for option in action.option_strings}


def page() -> str:
    """docs/reference/commands.md, as the site has it."""
    lines = [_HEAD]
    for program in PROGRAMS:
        for command, about, parser in all_commands(program):
            depth = 2 + (command != program)
            lines += [f"{'#' * depth} `{command}`", ""]
            lines += [f"{text}\n" for text in _texts(about, parser)]
            if not list(subcommands(parser)):
                parser.prog = command
                with mock.patch.dict(os.environ, COLUMNS="88"):
                    usage = parser.format_usage().removeprefix("usage: ")
                lines += ["```text", usage.rstrip(), "```", ""]
                lines += _table(parser)
    return "\n".join(lines)


def _texts(about: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """What it is for, whole paragraphs as Markdown; what is laid out by lines, as it is."""
    if about:
        yield cell(about[:1].upper() + about[1:] + ".")
    laid_out = parser.formatter_class is argparse.RawDescriptionHelpFormatter
    for paragraph in [*(parser.description or "").split("\n\n"), *(parser.epilog or "").split("\n\n")]:
        if laid_out and "\n" in paragraph.strip():
            yield f"```text\n{paragraph.strip()}\n```"
        elif text := " ".join(paragraph.split()):
            yield cell(text)


def _table(parser: argparse.ArgumentParser) -> list[str]:
    rows = [
        f"| {_names(action)} | {_default(action)} | {cell(_help(parser, action))} |"
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction) and action.help != argparse.SUPPRESS
    ]
    return ["| argument | default | |", "|---|---|---|", *rows, ""] if rows else []


def _names(action: argparse.Action) -> str:
    value = action.metavar or action.dest.upper()
    if action.choices is not None:
        value = " \\| ".join(str(choice) for choice in action.choices)
    if isinstance(value, tuple):
        value = " ".join(value)
    if action.nargs in ("+", "*"):
        value = f"{value} …"
    if not action.option_strings:
        return f"`{value if action.metavar or action.choices is not None else action.dest}`"
    takes = "" if action.nargs == 0 else f" {value}"
    return ", ".join(f"`{option}{takes}`" for option in action.option_strings)


def _default(action: argparse.Action) -> str:
    if action.required and action.option_strings:
        return "needed"
    nothing = action.default is None or action.default is False or action.default in (argparse.SUPPRESS, [])
    if nothing or not action.option_strings or _OF_THIS_HOST.search(action.help or ""):
        return ""
    values = action.default if isinstance(action.default, (list, tuple)) else [action.default]
    return f"`{' '.join(str(value) for value in values)}`"


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = " ".join(parser._get_formatter()._expand_help(action).split()) if action.help else ""
    return _OF_THIS_HOST.sub("default one for each core", text)
