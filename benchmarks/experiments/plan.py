"""What was decided before the runs: seeds, cells, the questions, and how settings are chosen.

Primary measure: TAR at a FAR of 1e-3 over all pairs of held-out identities. Primary cell: noise and long tail, on both
kinds of data. Primary questions, there, on seeds that nothing was tuned on:

1. full against ArcFace at the best of its three margins, best by the very runs that are compared;
2. full against the placebo in which hard levels are dealt out anew;
3. full against the placebo in which everything that clusters say is replaced.

Each is answered by Wilcoxon's signed ranks over all ten paired seeds, two-sided, with Holm's correction over the three.
On clean data, full must not be worse than the best ArcFace by more than 0.2 points in the mean. All other arms and
cells are shown beside them, with Holm's correction over the arms of a cell, and decide nothing.

The tier of images asks the same of larger trainings, with margins of its own choice; its rate and batch were set after
the tier of features had answered, and before any of its own runs that count.

On clean images full was worse by 0.5: of the 2% that are suspects there all are right. So suspects were dropped only
where they are 5% or more ("full, sure"; development seeds 100 and 101 said so). Whether that does harm was asked again
on seeds of its own (round 1), against the ArcFace that was best on clean images: it did half the harm. The first
versions of a training suspect far more, others each time. So now two fifths of the last version's suspects must be
suspects still ("full, agreed"; the same development seeds). That is asked in round 2, and in the noisy cell.

Round 3 asks the three primary questions again of "full, agreed", in the noisy cell, with placebos that drop as it does,
and with all runs on one machine: on faces the placebo that replaces everything had been as good as full. Margins are
chosen anew there, on the tuning seeds. It asks the first and the third of "full, own" as well, and whether that does
harm on clean data: centres of their owners' samples alone, which the placebo has (docs/experiments.md says how it was
found, on seeds 100 to 103). Decided before its runs, and before a look at the others.

Round 4 asks about margins by hard level: on images they had added nothing, or less, in each round. On seeds 100 to 103
larger ones for hard classes cost 0.2 to 0.3 points against one margin for all; smaller ones for classes whose samples
lie apart (h of 1 - rho alone) gained 0.1 to 0.2 ("full, own, loose smaller"). Asked in the noisy cell, of that: is it
above the ArcFace that was best there before, above one margin for all, and above "full, own"? On clean data: does it do
harm, against the ArcFace that was best there? Decided before its runs.

A seed draws training, validation and test identities from the same 1200: seeds are new samples of them, not new people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.experiments.cells import CELLS
from benchmarks.experiments.runs import Result, Run
from benchmarks.experiments.tiers import TIERS

TUNING_SEEDS = (100, 101)
ROUNDS = (1, 2, 3, 4)
"""Of questions asked anew, each on ten seeds of its own (`seeds_of`)."""
PRIMARY_CELLS = ("noise tail", "clean")
WORSE_AT_MOST = 0.2

Margins = Mapping[tuple[str, str, str], float]
"""Of (kind, primary cell, arm), in one tier."""


def seeds_of(round_: int) -> tuple[int, ...]:
    """0: those of the primary questions. Others: for what was changed after the answers of the round before."""
    return tuple(range(10 * round_, 10 * round_ + 10))


def tuned_in(cell: str) -> str:
    """The primary cell in which margins for `cell` are chosen: large ones suit wrong labels, small ones right ones."""
    noisy, clean = PRIMARY_CELLS
    return noisy if CELLS[cell].noise or CELLS[cell].strangers else clean


def tuning_runs(tier: str, kinds: Sequence[str], cells: Sequence[str], arms: Sequence[str]) -> list[Run]:
    """Every arm's tries, in the primary cells that `cells` need."""
    return [
        Run(tier, kind, cell, arm, margin, seed)
        for seed in TUNING_SEEDS
        for cell in dict.fromkeys(tuned_in(cell) for cell in cells)
        for kind in kinds
        for arm in arms
        if not TIERS[tier].arms[arm].like
        for margin in TIERS[tier].arms[arm].margins
    ]


def chosen_margins(results: Sequence[Result], tier: str) -> dict[tuple[str, str, str], float]:
    """Of each (kind, primary cell, arm) the margin of best mean TAR on validation identities; ties to the smaller.

    An arm has none before all its tries are there. One that is like another takes that one's.
    """
    tries: dict[tuple[str, str, str], dict[float, list[float]]] = {}
    for result in results:
        if result["seed"] in TUNING_SEEDS and result["cell"] in PRIMARY_CELLS and result["tier"] == tier:
            arm = tries.setdefault((result["kind"], result["cell"], result["arm"]), {})
            arm.setdefault(result["margin"], []).append(result["validation"][0])
    chosen = {
        key: min(margins, key=lambda margin: (-sum(margins[margin]) / len(margins[margin]), margin))
        for key, margins in tries.items()
        if all(len(margins.get(margin, ())) == len(TUNING_SEEDS) for margin in TIERS[tier].arms[key[2]].margins)
    }
    likes = {name: arm.like for name, arm in TIERS[tier].arms.items() if arm.like}
    for name, like in likes.items():
        chosen |= {(kind, cell, name): margin for (kind, cell, other), margin in chosen.items() if other == like}
    return chosen


def final_runs(
    tier: str, kinds: Sequence[str], cells: Sequence[str], arms: Sequence[str], margins: Margins, seeds: Sequence[int]
) -> list[Run]:
    """Seed by seed: an experiment that is broken off has compared the same seeds for every arm.

    Raises KeyError where an arm has no margin yet.
    """
    return [
        Run(tier, kind, cell, arm, margins[kind, tuned_in(cell), arm], seed)
        for seed in seeds
        for cell in cells
        for kind in kinds
        for arm in arms
    ]
