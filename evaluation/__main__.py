"""Embed images with a trained backbone; evaluate backbones and embeddings; compare runs."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from rich.console import Console

from configs.schema import ConfigError, TrainConfig
from data.commands.arguments import Parser
from data.errors import DataError
from evaluation.commands.compare import add as add_compare
from evaluation.commands.embed import add as add_embed
from evaluation.commands.embed import embed_set
from evaluation.commands.export import add as add_export
from evaluation.commands.identification import add as add_identification
from evaluation.commands.ijb import add as add_ijb
from evaluation.commands.verify import add as add_verify
from evaluation.commands.verify import verify_sets
from evaluation.embed.records import EmbedError
from training.distributed import Ranks, open_ranks


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when done, 2 when arguments, weights or data are not as expected (one line says what), 130 if interrupted."""
    args = _parser().parse_args(arguments)
    console = Console(stderr=True)
    ranks: Ranks | None = None
    try:
        if args.run_alone is not None:
            args.run_alone(args, console)
            return 0
        train = TrainConfig(device=args.device, precision="fp32")
        with open_ranks(train) as ranks:
            args.run_ranks(args, device=ranks.device, group=ranks.group, is_main=ranks.is_main, console=console)
    except (ConfigError, DataError, EmbedError) as error:
        if ranks is None or ranks.first_to_say(str(error)):
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m evaluation", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    add_embed(commands).set_defaults(run_ranks=embed_set, run_alone=None)
    add_verify(commands).set_defaults(run_ranks=verify_sets, run_alone=None)
    for add in (add_ijb, add_identification, add_compare, add_export):
        add(commands)
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's end is an interrupt: tidy up, then go
    sys.exit(main())
