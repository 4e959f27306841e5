"""Do look-alike classes, added to the few that are drawn for a step, make a better net on the demo's synthetic faces?

A small batch and a small share of drawn classes, so that most of a class's look-alikes would not be in a step. Against
the neighbours stand the same share without them, more drawn classes, as many as take part with 8 neighbours on average
over the run, and all classes. Cluster terms other than the neighbours are off: nothing else differs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from benchmarks.demos.report import parser_of, report
from benchmarks.demos.runs import Result, runs_of, train
from benchmarks.measuring.report import facts
from training.demo import DemoError

_MODULE = "benchmarks.hard_negatives"
_BATCH = 32
_RATE = 0.02
_LEARNING_RATE = f"optim.reference_batch={_BATCH}"
"""The recipe's, not scaled down to the small batch: neighbours must mean something after the first epoch."""


def _near(k: int) -> tuple[str, ...]:
    """k neighbours take part from the first table on, a tenth of an epoch after the first epoch; then half an epoch
    to the next one."""
    return (
        *(_LEARNING_RATE, f"head.sample_rate={_RATE}", "clustering.enabled=true", f"clustering.hard_negatives={k}"),
        *("clustering.warmup_fraction=0", "clustering.ramp_fraction=0"),
        *("clustering.refresh_epochs=0.5", "clustering.refresh_span=0.2"),
        *("clustering.direction=0", "clustering.contrastive_weight=0", "clustering.alignment_weight=0"),
    )


ARMS: dict[str, tuple[str, ...]] = {
    "random": (_LEARNING_RATE, f"head.sample_rate={_RATE}"),
    "near-2": _near(2),
    "near-8": _near(8),
    "all": (_LEARNING_RATE, "head.sample_rate=1.0"),
}
AS_MANY = "random-as-many"


def rate_for(classes: float, random: float, num_classes: float) -> float:
    """Share to draw so that `classes` of all `num_classes` take part, where `random` do at _RATE.

    Those that are not of the batch are drawn with the chance of the rate, so that the number is linear in it.
    """
    return round(_RATE + (1 - _RATE) * (classes - random) / (num_classes - random), 4)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when done, 1 when a run failed, 2 when an argument is not as expected."""
    arguments = sys.argv[1:] if arguments is None else arguments
    question = (__doc__ or "").partition("\n")[0]
    parser = parser_of(_MODULE, question, arms=[*ARMS, AS_MANY], seeds=[0, 1], folder="runs/hard_negatives")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    about = facts(torch.device("cpu"), _MODULE, arguments)

    def results_of(arms: dict[str, tuple[str, ...]], seeds: Sequence[int]) -> list[Result]:
        runs = runs_of(arms, seeds, epochs=args.epochs, batch=_BATCH)
        results, said = train(runs, folder=args.folder, jobs=args.jobs)
        failed.update(said)
        return results

    failed: dict[str, str] = {}
    try:
        results = results_of({arm: own for arm, own in ARMS.items() if arm in args.only}, args.seeds)
        if AS_MANY in args.only:
            first = results_of({arm: ARMS[arm] for arm in ("random", "near-8", "all")}, args.seeds[:1])
            if len(first) == 3:
                random, near, every = (result["classes"] for result in first)
                results += results_of(
                    {AS_MANY: (_LEARNING_RATE, f"head.sample_rate={rate_for(near, random, every)}")}, args.seeds
                )
    except DemoError as error:
        parser.error(str(error))
    return report("Look-alike classes in a sampled softmax", results, failed, about=about, out=args.out)


if __name__ == "__main__":
    sys.exit(main())
