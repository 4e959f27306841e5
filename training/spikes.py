"""Spikes of the loss, told from its noise: a pure function of the losses so far, on the host.

A loss is too high when it lies `deviations` deviations above the median of the last 256 losses. The deviation is the
larger of two robust ones (from the quartiles, and from median and upper decile, for noise with a long tail upwards),
and at least 1% of the median. Three of four steps that are too high are a spike: one hard batch stands out alone, and
the next loss shows that the weights have not suffered; a step that did harm is seen in all that follow. A spike is
over after 16 steps that are not too high. All losses enter the window, so that a new level is the usual one after some
128 steps. Ours.
"""

from __future__ import annotations

import bisect
from collections import deque
from dataclasses import dataclass
from typing import Any

_WINDOW, _FEWEST = 256, 64
_HIGH, _OF = 3, 4
_CALM = 16
_LEAST = 0.01
_QUARTILES, _DECILE = 1.349, 1.2816  # of a normal distribution with a deviation of 1


@dataclass(frozen=True, slots=True)
class Spike:
    """What was found in a step."""

    began: int
    """Steps ago that the first of the losses that are too high came: 0 … 3."""
    usual: float
    deviation: float


class SpikeDetector:
    """Takes every step's loss; a few microseconds each."""

    def __init__(self, deviations: float) -> None:
        """deviations: 0 finds nothing."""
        self._deviations = deviations
        self._losses: deque[float] = deque()
        self._clear()

    def _clear(self) -> None:
        self._losses.clear()
        self._sorted: list[float] = []
        self._high: deque[bool] = deque(maxlen=_OF)
        self._calm = _CALM
        """Steps since the last loss that was too high, up to those after which a spike is over."""
        self._in_spike = False

    def add(self, loss: float) -> Spike | None:
        """The spike that this loss completes, once for each. loss: finite."""
        if not self._deviations:
            return None
        usual, deviation = self._usual() if len(self._losses) >= _FEWEST else (loss, 1.0)
        high = loss > usual + self._deviations * deviation
        self._high.append(high)
        self._calm = 0 if high else min(_CALM, self._calm + 1)
        self._take(loss)
        if self._in_spike:
            self._in_spike = self._calm < _CALM
            return None
        if not high or sum(self._high) < _HIGH:
            return None
        self._in_spike = True
        return Spike(len(self._high) - 1 - self._high.index(True), usual, deviation)

    def _usual(self) -> tuple[float, float]:
        n = len(self._sorted)
        lower, median, upper, decile = (self._sorted[int(share * (n - 1))] for share in (0.25, 0.5, 0.75, 0.9))
        return median, max((upper - lower) / _QUARTILES, (decile - median) / _DECILE, _LEAST * abs(median), 1e-12)

    def _take(self, loss: float) -> None:
        self._losses.append(loss)
        bisect.insort(self._sorted, loss)
        if len(self._losses) > _WINDOW:
            del self._sorted[bisect.bisect_left(self._sorted, self._losses.popleft())]

    def forget(self) -> None:
        """Begin anew, after a rollback."""
        self._clear()

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": list(self._losses),
            "high": list(self._high),
            "calm": self._calm,
            "in_spike": self._in_spike,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._clear()
        self._losses.extend(state["losses"])
        self._sorted = sorted(self._losses)
        self._high.extend(state["high"])
        self._calm, self._in_spike = state["calm"], state["in_spike"]
