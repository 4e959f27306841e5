"""Recipes out of others' configuration files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from configs.from_insightface import translated, write_new
from configs.schema import ConfigError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        """One line, as for all that can be wrong."""
        self.exit(2, f"error: {message} ({self.prog} --help lists all)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when done, 2 when arguments or the file are not as expected (one line says what)."""
    parser = _Parser(prog="python -m configs", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    command = commands.add_parser(
        "from-insightface",
        help="a recipe for one of arcface_torch's config files, which is read and never run",
        epilog="Example: python -m configs from-insightface configs/ms1mv3_r50.py --out ms1mv3.yaml",
    )
    command.add_argument("file", type=Path, metavar="CONFIG.PY")
    command.add_argument("--out", type=Path, metavar="RECIPE.YAML", help="else it is printed")
    args = parser.parse_args(arguments)
    try:
        text = translated(args.file)
        if args.out is None:
            print(text, end="")
        else:
            write_new(args.out, text)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
