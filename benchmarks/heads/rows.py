"""Rows of the head's benchmark: figures, and the ratios that are quoted."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.heads.arms import STYLE, Arm
from benchmarks.measuring.report import digits, spread

HEADER = (
    "classes",
    "head",
    "step ms",
    "range ms",
    "fwd+bwd ms",
    "speed",
    "GEMM share",
    "peak MB",
    "MB ratio",
)
ONLY_IN_FILE = ("range ms", "fwd+bwd ms")
_LEGEND = {
    "speed, MB ratio": f"steps in the time of one step of {STYLE} at the same rate, and memory over its memory",
    "fwd+bwd ms": "the optimizer's share of the step is the rest; ours computes the centres' gradient there",
    "GEMM share": "time that four matrix products over the classes that take part would need alone, at the peak rate "
    "of such products, over the time of the step",
    "peak MB": "memory of a step at its peak, beyond weights, momentum and batch",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """Figures of one head at one number of classes. Times in seconds, one for each turn; memory in bytes."""

    classes: int
    arm: Arm
    centres: int
    """Classes that take part in a step, on average."""
    learn: tuple[float, ...] = ()
    """Forward and backward."""
    step: tuple[float, ...] = ()
    """Forward, backward and optimizer."""
    extra: int | None = None
    """Peak of a step beyond weights, momentum and batch; None: not measured."""
    gemm: float = 0.0
    """Seconds that four matrix products would take alone."""
    skipped: str = ""
    """Why there are no figures."""

    @property
    def median(self) -> float:
        return statistics.median(self.step)

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        data = dataclasses.asdict(self)
        return {**data, "arm": self.arm.kind, "rate": self.arm.rate}


def cells(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    """The texts of a row, as HEADER names them; ratios to the baseline at the same number of classes and rate."""
    if row.skipped:
        return (f"{row.classes:,}", str(row.arm), "left out", *["-"] * (len(HEADER) - 3))
    baseline = _baseline(row, rows)
    return (
        f"{row.classes:,}",
        str(row.arm),
        digits(1000 * row.median),
        spread([1000 * seconds for seconds in row.step]),
        digits(1000 * statistics.median(row.learn)),
        f"{baseline.median / row.median:.2f}" if baseline else "-",
        f"{row.gemm / row.median:.2f}",
        "-" if row.extra is None else digits(row.extra / 1e6),
        f"{row.extra / baseline.extra:.3f}" if row.extra is not None and baseline and baseline.extra else "-",
    )


def ceilings(rows: Sequence[Row]) -> dict[str, str]:
    """The legend, and how much faster than the baseline a head would be that did nothing but its matrix products."""
    found = [
        f"{digits(row.median / row.gemm)} at {row.classes:,} classes{f', rate {row.arm.rate:g}' * (row.arm.rate < 1)}"
        for row in rows
        if row.arm.kind == STYLE and not row.skipped
    ]
    told = {f"ceiling: step of {STYLE} over the time of the matrix products alone": "; ".join(found)} if found else {}
    return _LEGEND | told


def _baseline(row: Row, rows: Sequence[Row]) -> Row | None:
    same = (other for other in rows if other.classes == row.classes and other.arm == row.arm.baseline)
    found = next(same, None)
    return found if found and not found.skipped else None
