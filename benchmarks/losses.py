"""Do all of the head's losses and settings train, and to what accuracy, on the demo's synthetic faces?

One training of each, with settings chosen beforehand and not tuned: differences of the size that seeds make mean
nothing, and losses of different margins do not compare. Runs that were done before are not repeated.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from benchmarks.demos.report import parser_of, report
from benchmarks.demos.runs import runs_of, train
from benchmarks.measuring.report import facts
from training.demo import DemoError

_MODULE = "benchmarks.losses"
_BATCH = 128
"""On one rank the global batch that the demo has on two."""

_SGD = (
    *("optim.name=sgd", "optim.lr=0.1", "optim.reference_batch=512", "optim.weight_decay=5e-4"),
    "head.sample_rate=0.1",
)
"""The schema's defaults: catching up is for SGD, so that it needs a baseline of its own."""

ARMS: dict[str, tuple[str, ...]] = {
    "arcface": (),
    "straight-through": ("head.straight_through=true",),
    "cosface": ("head.loss=cosface", "head.margin=0.35"),
    "combined": ("head.loss=combined", "head.m1=1.0", "head.margin=0.3", "head.m3=0.2"),
    # The demo's embeddings are 7 to 15 long (from the 1st to the 99th of a hundred, trained; 10.7 on average), so that
    # the mean margin is near the 0.3 of the others. length_weight exceeds the least that pulls harder than the
    # margin everywhere, s K l^2 u^2 / (u^2 - l^2) with K the margin's slope in the length, as much as MagFace's does.
    "magface": (
        *("head.loss=magface", "head.length_low=7", "head.length_high=15", "head.length_weight=73"),
        *("head.margin_low=0.2", "head.margin_high=0.4"),
    ),
    "adaface": ("head.loss=adaface", "head.margin=0.4"),
    "curricularface": ("head.loss=curricularface",),
    "subcentres-3": ("head.subcentres=3",),
    "interclass-filter": ("head.interclass_filter=0.4",),
    # As docs/method.md says, but for the span: of few epochs, less is to pass without margins. Their mean is less
    # than half of head.margin, 0.7 brings it near 0.3.
    "kappaface": (
        *("clustering.enabled=true", "clustering.margin_rule=kappaface", "head.margin=0.7"),
        *("clustering.noise_gate=false", "clustering.warmup_fraction=0", "clustering.ramp_fraction=0"),
        *("clustering.contrastive_weight=0", "clustering.alignment_weight=0", "clustering.refresh_span=0.2"),
    ),
    "on-sphere": ("head.on_sphere=true",),
    "bf16-centres": ("head.centre_dtype=bf16",),
    "sgd-rate-0.1": _SGD,
    "sgd-rate-0.1-catch-up": (*_SGD, "head.missed_steps=catch_up"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when done, 1 when a run failed, 2 when an argument is not as expected."""
    arguments = sys.argv[1:] if arguments is None else arguments
    question = (__doc__ or "").partition("\n")[0]
    parser = parser_of(_MODULE, question, arms=list(ARMS), seeds=[2048], folder="runs/losses")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    about = facts(torch.device("cpu"), _MODULE, arguments)
    runs = runs_of({arm: ARMS[arm] for arm in args.only}, args.seeds, epochs=args.epochs, batch=_BATCH)
    try:
        results, failed = train(runs, folder=args.folder, jobs=args.jobs)
    except DemoError as error:
        parser.error(str(error))
    return report("Losses on the demo's faces", results, failed, about=about, out=args.out)


if __name__ == "__main__":
    sys.exit(main())
