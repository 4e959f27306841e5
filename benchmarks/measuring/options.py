"""Options that several benchmarks have."""

from __future__ import annotations

import argparse

from configs.schema import ConfigError, HeadConfig


def check_sizes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with the parser's error where batch, dim, classes, rates, repeats or warmup are out of range."""
    if min(args.batch, args.repeats, args.dim - 1, *(classes - 1 for classes in args.classes)) < 1 or args.warmup < 0:
        parser.error(
            "expected --batch and --repeats of at least 1, --dim and --classes of at least 2, --warmup 0 or more"
        )
    try:
        for rate in args.rates:
            HeadConfig(sample_rate=rate)
    except ConfigError as error:
        parser.error(str(error))
