"""The blocks of a page: what a reader is asked to type, to write into a file, and what is printed."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^(?P<indent>[ \t]*)```(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```[ \t]*$", re.M | re.S)
_TABLE = "┏━"
"""Printed, not typed, whatever the block is called."""
_TITLE = re.compile(r'title="([^"]+)"')
PROGRAMS = ("make", ".venv/bin/", "python", "torchrun", "tensorboard", "pip", ".", "ls", "git")
"""What a line that is typed begins with."""


class Block(NamedTuple):
    """A fenced block."""

    page: str
    line: int
    kind: str
    """commands, python, file, or output."""
    text: str
    title: str = ""
    """Of a file: its path."""

    def commands(self) -> list[tuple[str, list[str]]]:
        """What is typed, a line each, and what it prints, if the block shows that: lines after `$ …`."""
        found: list[tuple[str, list[str]]] = []
        transcript = any(line.startswith("$ ") for line in self.text.splitlines())
        whole = self.text.replace("\\\n", " ")
        for line in whole.splitlines():
            if transcript and not line.startswith("$ "):
                found[-1][1].append(line)
            elif line.strip() and not line.lstrip().startswith("#"):
                found.append((" ".join(line.removeprefix("$ ").partition("  #")[0].split()), []))
        return found


def blocks_of(page: str) -> Iterator[Block]:
    """All fenced blocks of a page. Raises ValueError for one of which it cannot be said what it is."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        inner = textwrap.dedent(match["text"])
        language, _, rest = match["info"].strip().partition(" ")
        title = _TITLE.search(rest)
        if title:
            yield Block(page, line, "file", inner, title[1])
        elif language == "python":
            yield Block(page, line, "python", inner)
        elif language in ("text", "mermaid") or _TABLE in inner:
            yield Block(page, line, "output", inner)
        elif language in ("", "sh", "console") and _is_typed(inner):
            yield Block(page, line, "commands", inner)
        else:
            raise ValueError(
                f"{page}:{line}: expected commands, python, a file with a title, or text that is printed (```text), "
                f"got ```{match['info']}"
            )


def _is_typed(text: str) -> bool:
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
    if any(line.startswith("$ ") for line in lines):
        return lines[0].startswith("$ ")
    return bool(lines) and all(line.split()[0].startswith(PROGRAMS) for line in lines)
