"""Pack, look into, verify, hash, cut, join, shuffle and convert record sets."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from data.commands import choose, convert, hashes, look, pack, verify
from data.commands.arguments import Parser
from data.commands.packing import Options, rebuild_index, write_bin_of
from data.commands.plans import bin_of_all
from data.errors import DataError
from data.making.sources import RESIZE_RULE


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when done, 1 when `verify` or `check` found something, 2 when arguments or data are not as expected (one line
    says what), 130 when interrupted.
    """
    args = _parser().parse_args(arguments)
    console = Console(stderr=True)
    try:
        return int(args.run(args, console) or 0)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"error: interrupted; {str(stop) or 'what was not finished is gone'}", file=sys.stderr)
        return 130


def _index(args: argparse.Namespace, console: Console) -> None:
    rebuild_index(args.rec, images_only=args.images_only, console=console)


def _bin(args: argparse.Namespace, console: Console) -> None:
    held_out = bin_of_all(args.source, pairs=args.pairs, seed=args.seed)
    write_bin_of(args.out, held_out, Options(args.workers, args.force), console)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    pack.add(commands)

    index = commands.add_parser("index", help="rebuild the .idx beside a .rec")
    index.add_argument("rec", type=Path)
    index.add_argument("--images-only", action="store_true", help="without identity headers, and up to a cut")
    index.set_defaults(run=_index)

    make_bin = commands.add_parser("bin", help="a verification set of a folder of identities", description=RESIZE_RULE)
    make_bin.add_argument("source", type=Path, metavar="FOLDER")
    make_bin.add_argument("--out", type=Path, required=True, metavar="FILE")
    pack.add_pairs(make_bin, pairs=6000)
    make_bin.set_defaults(run=_bin)
    for module in (look, verify, hashes, choose, convert):
        module.add(commands)
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's end is an interrupt: tidy up, then go
    sys.exit(main())
