"""What the runs say: a table for each kind and cell, the primary questions, and a picture of all differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.experiments.arms import AGAINST, AGREED, AGREED_AGAINST, LOOSE, ONE, OWN, SURE, is_arcface
from benchmarks.experiments.plan import (
    PRIMARY_CELLS,
    WORSE_AT_MOST,
    chosen_margins,
    seeds_of,
    tuned_in,
)
from benchmarks.experiments.runs import Result
from benchmarks.experiments.statistics import Comparison, compare, holm
from benchmarks.experiments.tiers import TIERS
from benchmarks.measuring.report import markdown_table

HEADER = (
    "seeds",
    "arm",
    "margin",
    "TAR@1e-3",
    "against best ArcFace",
    "p (Holm)",
    "TAR@1e-4",
    "loss",
    "suspects P / R",
)

_PANELS = 4
"""Side by side in the picture."""

By_arm = dict[str, dict[int, Result]]


def group(results: Sequence[Result], tier: str, seeds: Sequence[int] = seeds_of(0)) -> dict[tuple[str, str], By_arm]:
    """(kind, cell) to arm to seed to its result; these seeds at the chosen margin alone."""
    cells: dict[tuple[str, str], By_arm] = {}
    margins = chosen_margins(results, tier)
    for result in results:
        chosen = margins.get((result["kind"], tuned_in(result["cell"]), result["arm"]))
        if result["tier"] == tier and result["seed"] in seeds and result["margin"] == chosen:
            arms = cells.setdefault((result["kind"], result["cell"]), {})
            arms.setdefault(result["arm"], {})[result["seed"]] = result
    return cells


def paired(arms: By_arm, name: str, other: str, far: int = 0) -> Comparison | None:
    """Over the seeds that both have; None with fewer than two."""
    seeds = sorted(arms.get(name, {}).keys() & arms.get(other, {}).keys())
    if len(seeds) < 2:
        return None
    first, second = ([arms[arm][seed]["test"][far] for seed in seeds] for arm in (name, other))
    return compare(first, second)


def best_arcface(arms: By_arm) -> str | None:
    """By the mean of the very runs: the most that can be said for it."""
    return max(filter(is_arcface, sorted(arms)), key=lambda name: _mean(arms[name], 0), default=None)


def _mean(seeds: Mapping[int, Result], far: int) -> float:
    return float(np.mean([result["test"][far] for result in seeds.values()]))


def rows(arms: By_arm, tier: str) -> list[tuple[str, ...]]:
    """Texts as HEADER names them, arms in their order."""
    best = best_arcface(arms)
    against = {name: paired(arms, name, best) for name in TIERS[tier].arms if best and name in arms and name != best}
    p_values = holm({name: found.p for name, found in against.items() if found and not is_arcface(name)})
    return [
        (
            str(len(seeds)),
            name,
            f"{next(iter(seeds.values()))['margin']:g}",
            f"{_mean(seeds, 0):.2f}",
            "best" if name == best else _difference(against.get(name)),
            f"{p_values[name]:.3f}" if name in p_values else "",
            f"{_mean(seeds, 1):.2f}",
            " -> ".join(f"{np.mean([result['loss'][epoch] for result in seeds.values()]):.2f}" for epoch in (0, 1)),
            _suspects(list(seeds.values())),
        )
        for name in TIERS[tier].arms
        if (seeds := arms.get(name))
    ]


def _difference(found: Comparison | None) -> str:
    return "" if found is None else f"{found.mean:+.2f} ({found.low:+.2f} … {found.high:+.2f})"


def _suspects(results: Sequence[Result]) -> str:
    if not all("precision" in result for result in results):
        return ""
    return " / ".join(f"{np.mean([result[name] for result in results]):.2f}" for name in ("precision", "recall"))


def fresh_answers(cells: Mapping[tuple[str, str], By_arm]) -> list[str]:
    """Of a later round's runs: does what was changed do harm on clean data, against the ArcFace that ran there? In the
    noisy cell: the primary questions, where their runs are.
    """
    lines = []
    for (kind, cell), arms in sorted(cells.items()):
        best = best_arcface(arms)
        asked = ((AGREED, AGREED_AGAINST), (OWN, AGREED_AGAINST[1:]), (LOOSE, (ONE, OWN)))
        for name, others in asked if cell == PRIMARY_CELLS[0] else ():
            if best and all(arm in arms for arm in (name, *others)):
                lines += _primary(f"{kind}, {cell}, fresh seeds", arms, name, (best, *others))
        for name in (SURE, AGREED, OWN, LOOSE) if cell == PRIMARY_CELLS[1] else ():
            if best and (found := paired(arms, name, best)):
                said = "no" if found.mean >= -WORSE_AT_MOST else "yes"
                count = len(arms[name].keys() & arms[best].keys())
                lines.append(
                    f"{kind}, {cell}, {count} fresh seeds: {name} worse than {best} by over "
                    f"{WORSE_AT_MOST}? {said}: {_difference(found)}"
                )
    return lines


def answers(cells: Mapping[tuple[str, str], By_arm], tier: str) -> list[str]:
    """A line for each primary question and kind, once all runs that it needs are there."""
    noisy, clean = PRIMARY_CELLS
    arcface, lines = TIERS[tier].arcface, []
    for kind in sorted({kind for kind, _ in cells}):
        arms = cells.get((kind, noisy), {})
        if _complete(arms, ("full", *arcface, *AGAINST)):
            others = [other for other in (best_arcface(arms), *AGAINST) if other]
            lines += _primary(f"{kind}, {noisy}", arms, "full", others)
        elif arms:
            lines.append(f"{kind}, {noisy}: not answered yet: runs are missing")
        best = best_arcface(arms)
        if best and _complete(arms, (AGREED, *arcface)) and (later := paired(arms, AGREED, best)):
            lines.append(f"{kind}, {noisy}: {AGREED} against {best}, run later: {_difference(later)}, p {later.p:.3f}")
        arms = cells.get((kind, clean), {})
        best = best_arcface(arms)
        if best and _complete(arms, ("full", *arcface)) and (harmless := paired(arms, "full", best)):
            said = "no" if harmless.mean >= -WORSE_AT_MOST else "yes"
            lines.append(
                f"{kind}, {clean}: full worse than {best} by over {WORSE_AT_MOST}? {said}: {_difference(harmless)}"
            )
    return lines


def _primary(where: str, arms: By_arm, name: str, others: Sequence[str]) -> list[str]:
    """Is the arm above each of the others? With Holm's correction over them."""
    found = {other: comparison for other in others if (comparison := paired(arms, name, other))}
    adjusted = holm({other: comparison.p for other, comparison in found.items()})
    lines = []
    for other, comparison in found.items():
        won = comparison.mean > 0 and adjusted[other] < 0.05
        said = "yes" if won else "no"
        lines.append(f"{where}: {name} above {other}? {said}: {_difference(comparison)}, p {adjusted[other]:.3f}")
    return lines


def _complete(arms: By_arm, names: Sequence[str]) -> bool:
    return all(set(arms.get(name, ())) == set(seeds_of(0)) for name in names)


def write(
    cells: Mapping[tuple[str, str], By_arm], tier: str, about: Mapping[str, str], lines: Sequence[str], out: Path
) -> None:
    """Markdown with everything, beside it the picture. cells: as `group` gives them. lines: answers."""
    text = f"# Does cluster guidance help? The tier of {tier}\n\n"
    text += "".join(f"- {name}: {value}\n" for name, value in about.items())
    if lines:
        text += "\n## The questions that were asked beforehand\n\n" + "".join(f"- {line}\n" for line in lines)
    for (kind, cell), arms in sorted(cells.items()):
        text += f"\n## {kind}, {cell}\n\n{markdown_table(HEADER, rows(arms, tier))}"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    figure(cells, tier).savefig(out.with_suffix(".png"), dpi=110)


def figure(cells: Mapping[tuple[str, str], By_arm], tier: str) -> Figure:
    """Differences to the best ArcFace with their intervals, a panel for each kind and cell."""
    shown = sorted(cells)
    across = min(_PANELS, len(shown))
    down = -(-len(shown) // across)
    names = [name for name in TIERS[tier].arms if not is_arcface(name) and any(name in arms for arms in cells.values())]
    drawn = Figure(figsize=(4.6 * across, (1.6 + 0.28 * len(names)) * down), layout="constrained")
    grid = drawn.subplots(down, across, sharey=True, squeeze=False)
    panels = grid.flatten()
    for panel, key in zip(panels, shown, strict=False):
        best = best_arcface(cells[key])
        for place, name in enumerate(names):
            if best and (found := paired(cells[key], name, best)):
                colour = "tab:red" if "shuffled" in name else "tab:blue"
                error = [[found.mean - found.low], [found.high - found.mean]]
                panel.errorbar(found.mean, place, xerr=error, fmt="o", color=colour, capsize=3)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_title(", ".join(key))
        panel.set_xlabel(f"TAR@FAR=1e-3, points above {best}")
        panel.grid(axis="x", alpha=0.3)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    grid[0, 0].set_yticks(range(len(names)), names)
    grid[0, 0].set_ylim(len(names) - 0.5, -0.5)
    return drawn
