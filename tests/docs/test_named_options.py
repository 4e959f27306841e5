"""Commands, options and settings that any page names exist: read from the parsers and from the settings' classes."""

from __future__ import annotations

import argparse
import functools
import re
import typing
from collections.abc import Iterator
from typing import Literal

import pytest

from scripts.docs import commands
from scripts.docs.links import ROOT
from scripts.docs.settings import all_settings, sections

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"]
)
_FENCE = re.compile(r"^[ \t]*```([^\n`]*)\n(.*?)^[ \t]*```[ \t]*$", re.M | re.S)
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*")
_SETTING = re.compile(rf"(?<![\w./\"-])((?:{'|'.join(sections())})\.[a-z_0-9]+)\b(?!/|\.[a-z]|\()(?:=([\w.+-]+))?")
OTHERS = {
    "docker run": {
        "--entrypoint",
        "--gpus",
        "--ipc",
        "--network",
        "--read-only",
        "--rm",
        "--shm-size",
        "--tmpfs",
        "--user",
    },
    "docker build": {"--build-arg", "--secret"},
    "kubectl": {"--namespace"},
    "mkdocs build": {"--strict"},
    "sbatch, srun": {"--gpus-per-node", "--nodes", "--ntasks-per-node", "--signal", "--time"},
    "tensorboard": {"--bind_all", "--host", "--logdir", "--port"},
    "torchrun": {
        "--master_port",
        "--max-restarts",
        "--nnodes",
        "--node_rank",
        "--nproc-per-node",
        "--nproc_per_node",
        "--rdzv_backend",
        "--rdzv_conf",
        "--rdzv_endpoint",
        "--rdzv_id",
        "--shutdown-timeout",
        "--signals-to-handle",
        "--standalone",
    },
}
"""Program to options of it that pages name."""
_FILE = re.compile(r"train\.(rec|idx|lst|meta)|model\.pt|\w+\.py")
NO_SETTINGS = {"head.weight": "a tensor of a checkpoint", "train.epoch": "a wrong name, in a message that refuses it"}
"""What looks like a setting and is none."""


def _code_of(page: str) -> Iterator[str]:
    """Each line of a block that is not Python, and each span of code, with continued lines joined."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        if not match[1].startswith("python"):
            yield from match[2].replace("\\\n", " ").splitlines()
    for match in _SPAN.finditer(_FENCE.sub("", text)):
        yield " ".join(match[1].split())


@functools.cache
def _parsers() -> dict[str, argparse.ArgumentParser]:
    return {command: parser for program in commands.PROGRAMS for command, _, parser in commands.all_commands(program)}


@functools.cache
def _benchmark_options() -> set[str]:
    sources = [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    return {found for path in sources for found in re.findall(r'"(--[a-z][a-z0-9-]*)"', path.read_text("utf-8"))}


def _commands_in(line: str) -> Iterator[tuple[str, list[str]]]:
    """Each of our programs in a line, and the words behind it."""
    words = line.replace("-m -- ", "-m ").partition("  #")[0].split()
    for place, word in enumerate(words):
        if word == "-m" and place + 1 < len(words):
            yield f"python -m {words[place + 1].rstrip(',;:)')}", words[place + 2 :]
        elif word.endswith("train_dist.py"):
            yield "train_dist.py", words[place + 1 :]


def _faults(line: str) -> Iterator[str]:
    for program, words in _commands_in(line):
        if program not in commands.PROGRAMS:
            continue
        known, command = _parsers(), program
        while words and f"{command} {words[0]}" in known:
            command = f"{command} {words.pop(0)}"
        below = {name for name, _, _ in commands.subcommands(known[command])}
        if below and words and re.fullmatch(r"[a-z][a-z-]*", words[0]):
            yield f"{command} has no command {words[0]}: {line}"
        for word in words:
            option = word.partition("=")[0].strip("`,;:()[]…")
            if _OPTION.fullmatch(option) and option not in commands.options_of(known[command]):
                yield f"{command} has no option {option}: {line}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_options_exist(page: str) -> None:
    assert [fault for line in _code_of(page) for fault in _faults(line)] == []


@pytest.mark.parametrize("page", PAGES)
def test_options_named_alone_exist(page: str) -> None:
    known = {option for parser in _parsers().values() for option in commands.options_of(parser)}
    known |= _benchmark_options().union(*OTHERS.values())
    named = {option for line in _code_of(page) for option in _OPTION.findall(line)}
    assert named - known == set()


@pytest.mark.parametrize("page", PAGES)
def test_settings_exist_and_take_the_words_they_are_given(page: str) -> None:
    known = {setting.name for setting in all_settings()}
    for line in _code_of(page):
        for name, value in _SETTING.findall(line):
            if name in NO_SETTINGS or _FILE.fullmatch(name) or _is_module(name):
                continue
            assert name in known, line
            words = _words_of(name)
            if value and words:
                assert value in words, line


@pytest.mark.parametrize("page", PAGES)
def test_extras_exist_and_are_installed_from_the_checkout(page: str) -> None:
    """The package is not published: its name alone would install somebody else's."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    text = (ROOT / page).read_text(encoding="utf-8")
    assert not re.search(r"pip install [^\n`]*clusterface", text)
    for names in re.findall(r"pip install [^\n`]*\n?[^\n`]*'\.\[([\w,-]+)\]'", text):
        assert all(f'"{name}": [' in setup for name in names.split(","))


def _is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def _words_of(name: str) -> set[str]:
    section, _, field = name.partition(".")
    hint = typing.get_type_hints(sections()[section])[field]
    return {str(word) for word in typing.get_args(hint)} if typing.get_origin(hint) is Literal else set()


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("python -m data pack folder photos --out sets/mine --verification-identites 3", "--verification-identites"),
        ("torchrun --nproc_per_node=8 train_dist.py --config a.yaml --sets x", "--sets"),
        ("python -m evaluation embbed --run runs/mine", "embbed"),
        ("python -m data verify sets/mine --fix sets/mended", ""),
    ],
)
def test_what_does_not_exist_is_found(line: str, fault: str) -> None:
    found = list(_faults(line))
    assert bool(found) == bool(fault)
    assert all(fault in text for text in found)
