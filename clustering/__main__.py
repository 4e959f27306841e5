"""Cluster embeddings that lie in .npy files, report what looks wrong in their labels, clean the records."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from clustering.commands import clean, kmeans, report
from clustering.commands.arguments import Parser

_COMMANDS = (kmeans, report, clean)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when done, 2 when arguments or data are not as expected (one line says what), 130 or 143 when interrupted."""
    parser = Parser(prog="python -m clustering", description=__doc__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    for command in _COMMANDS:
        command.add(subparsers)
    args: argparse.Namespace = parser.parse_args(arguments)
    code: int = args.run(args)
    return code


if __name__ == "__main__":
    sys.exit(main())
