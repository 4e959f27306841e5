"""Look at what a run needs before it starts, at the checkpoints that it has written, and at weights of others."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from rich.console import Console

from data.commands.arguments import Parser
from training.commands import checkpoint, doctor, insightface, plan, start
from training.errors import USER_ERRORS

_COMMANDS = (plan, doctor, checkpoint, start, insightface)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when done, 1 when a check found something, 2 when arguments, settings or files are not as expected (one line
    says what), 130 when interrupted.
    """
    parser = Parser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    for command in _COMMANDS:
        command.add(commands)
    args: argparse.Namespace = parser.parse_args(arguments)
    try:
        return int(args.run(args, Console(stderr=True)))
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's end is an interrupt: tidy up, then go
    sys.exit(main())
