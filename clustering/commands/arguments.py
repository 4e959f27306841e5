"""Reading command lines: errors of one line, and the kinds of numbers that several commands take."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from data.commands.arguments import Parser

__all__ = ["Parser", "nonnegative", "whole"]


def whole(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """Reads a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, got {text!r}")
        return value

    return parse


def nonnegative(text: str) -> float:
    """Reads a finite number of 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of 0 or more, got {text!r}")
    return value
