"""Slurm's short form of host names, written out: `gpu[01-03,7],login` is gpu01, gpu02, gpu03, gpu7, login."""

from __future__ import annotations

import itertools
import re

_PART = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+")
"""One entry of a list: commas within brackets belong to it."""
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def expand(text: str) -> list[str]:
    """The hosts in the order of the list. Raises ValueError, with what is wrong, when it is no such list."""
    parts = _PART.findall(text)
    if not parts or ",".join(parts) != text:
        raise ValueError(f"expected hosts such as gpu[01-04,7],login, got {text!r}")
    return [host for part in parts for host in _entry(part)]


def _entry(part: str) -> list[str]:
    """`a[1-2]b[3-4]` is a1b3, a1b4, a2b3, a2b4: the last bracket runs fastest."""
    pieces = re.split(r"\[([^\[\]]*)\]", part)  # text and the insides of brackets take turns
    choices = [_numbers(piece) if place % 2 else [piece] for place, piece in enumerate(pieces)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _numbers(inside: str) -> list[str]:
    """`01-03,7` is 01, 02, 03, 7: leading zeros stay."""
    numbers: list[str] = []
    for item in inside.split(","):
        found = _RANGE.fullmatch(item)
        first, last = (found[1], found[2] or found[1]) if found else ("1", "0")
        if int(first) > int(last):
            raise ValueError(f"expected numbers and ranges such as 01-04,7 in brackets, got {inside!r}")
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return numbers
