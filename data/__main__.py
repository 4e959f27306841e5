"""Pack, look into, verify, hash, cut, join, shuffle and convert record sets."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from data.commands import choose, convert, hashes, look, verify
from data.commands.arguments import CORES, Parser, fraction, whole
from data.commands.packing import Options, bin_of_folder, folder_set, pack_set, rebuild_index, synthetic_set
from data.errors import DataError
from data.sources import RESIZE_RULE
from data.synthetic import DIFFICULTY_SPREAD


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
    except KeyboardInterrupt:
        print("error: interrupted; what was not finished is gone", file=sys.stderr)
        return 130


def _pack_synthetic(args: argparse.Namespace, console: Console) -> None:
    training, held_out = synthetic_set(
        identities=args.identities,
        images_per_identity=args.images_per_identity,
        seed=args.seed,
        label_noise=args.label_noise,
        long_tail=args.long_tail,
        difficulty_spread=args.difficulty_spread,
        verification_identities=args.verification_identities,
        pairs=args.pairs,
    )
    pack_set(args.out, training, held_out, Options(args.workers, args.force), console)


def _pack_folder(args: argparse.Namespace, console: Console) -> None:
    training, held_out = folder_set(
        args.source, seed=args.seed, verification_identities=args.verification_identities, pairs=args.pairs
    )
    pack_set(args.out, training, held_out, Options(args.workers, args.force, args.skip_bad), console)


def _index(args: argparse.Namespace, console: Console) -> None:
    rebuild_index(args.rec, images_only=args.images_only, console=console)


def _bin(args: argparse.Namespace, console: Console) -> None:
    options = Options(args.workers, args.force)
    bin_of_folder(args.source, args.out, pairs=args.pairs, seed=args.seed, options=options, console=console)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    pack = commands.add_parser("pack", help="write train.rec, train.idx, property and verification.bin")
    sources = pack.add_subparsers(required=True, metavar="SOURCE", parser_class=Parser)

    synthetic = sources.add_parser("synthetic", help="faces that are drawn, the same for the same arguments")
    synthetic.add_argument("--identities", type=whole(2), default=1000, help="default 1000")
    synthetic.add_argument("--images-per-identity", type=whole(1), default=20, help="default 20")
    synthetic.add_argument("--label-noise", type=fraction, default=0.0, help="share of wrong labels, default 0")
    synthetic.add_argument(
        "--long-tail", type=fraction, default=0.0, help="0: all have as many (default), to 1: some a 20th of it"
    )
    synthetic.add_argument(
        "--difficulty-spread",
        type=fraction,
        default=DIFFICULTY_SPREAD,
        help=f"0: all persons alike, to 1: from studio portraits to blurred and covered; default {DIFFICULTY_SPREAD}",
    )
    _common(synthetic, run=_pack_synthetic, held_out=100, pairs=2000)

    folder = sources.add_parser("folder", help="a subfolder of images for each identity", description=RESIZE_RULE)
    folder.add_argument("source", type=Path, metavar="FOLDER")
    folder.add_argument("--skip-bad", action="store_true", help="name images that do not decode and leave them out")
    _common(folder, run=_pack_folder, held_out=0, pairs=2000)

    index = commands.add_parser("index", help="rebuild the .idx beside a .rec")
    index.add_argument("rec", type=Path)
    index.add_argument("--images-only", action="store_true", help="without identity headers, and up to a cut")
    index.set_defaults(run=_index)

    make_bin = commands.add_parser("bin", help="a verification set of a folder of identities", description=RESIZE_RULE)
    make_bin.add_argument("source", type=Path, metavar="FOLDER")
    _common(make_bin, run=_bin, held_out=None, pairs=6000)
    for module in (look, verify, hashes, choose, convert):
        module.add(commands)
    return parser


def _common(
    parser: argparse.ArgumentParser,
    *,
    run: Callable[[argparse.Namespace, Console], None],
    held_out: int | None,
    pairs: int,
) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER" if held_out is not None else "FILE")
    parser.add_argument("--seed", type=whole(0), default=0, help="default 0")
    if held_out is not None:
        about = f"not trained on, for verification.bin; 0: none; default {held_out}"
        parser.add_argument("--verification-identities", type=whole(0), default=held_out, help=about)
    parser.add_argument("--pairs", type=whole(10), default=pairs, help=f"pairs to verify, default {pairs}")
    parser.add_argument("--workers", type=whole(1), default=CORES, help=f"processes, default {CORES} here")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    parser.set_defaults(run=run)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's end is an interrupt: tidy up, then go
    sys.exit(main())
