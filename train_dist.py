#!/usr/bin/env python3
"""Train a face recognition model by margin softmax and cluster guidance, on one process or many.

torchrun --nproc_per_node=8 train_dist.py --config configs/ms1mv3_r50.yaml --set data.path=/data/ms1m
python train_dist.py --config configs/demo.yaml
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from configs.load import load_config
from training.distributed import Ranks, open_ranks
from training.errors import USER_ERRORS
from training.ranks.lost import EXIT_LOST, LostRankError
from training.stopping import EXIT_CODE, Signals
from training.trainer import Trainer

_GRACE = 10.0
"""Seconds that the other ranks of a host leave to local rank 0 to say what all of them meet."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, metavar="FILE", help="recipe, one of configs/*.yaml")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="change one setting of the recipe; may be given many times (configs/schema.py lists all settings)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when the run ended as asked, 2 when a setting or the data are not as expected (one line says what), 75 when a
    signal stopped it, with a checkpoint, 76 when ranks lost each other: the same command goes on.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    args = parse(arguments)
    ranks: Ranks | None = None
    try:
        config = load_config(args.config, args.set)
        flights = Path(config.train.output) / "flight_recorder"
        # Until the ranks have met, a signal ends this process at once: there is nothing to lose.
        with open_ranks(config.train, flights=flights) as ranks, ranks.monitor, Signals() as signals:
            stopped = Trainer(config, ranks).run(signals)
    except USER_ERRORS as error:
        if ranks is None and os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(_GRACE)  # local rank 0 meets the same error and says it; torchrun then ends all ranks
        if ranks is None or ranks.first_to_say(str(error)):
            print(f"error: {error}", file=sys.stderr)
        return 2
    except LostRankError as error:
        if str(error):
            print(f"error: {error}", file=sys.stderr)
        return EXIT_LOST
    return EXIT_CODE if stopped else 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    if code == EXIT_LOST:
        os._exit(code)  # taking down a group whose ranks are gone may wait for them
    sys.exit(code)
