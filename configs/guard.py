"""Settings of the guard: what is done about steps that are not finite, and what counts as a spike of the loss."""

from __future__ import annotations

from dataclasses import dataclass

from configs.checks import require


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """Steps that are not finite are always skipped; this is what follows (docs/numerics.md)."""

    skips_to_roll_back: int = 10
    """Skipped steps in a row after which training goes back to the newest checkpoint."""
    rollback_lr: float = 0.5
    """What the learning rate of all later steps is multiplied by then."""
    max_rollbacks: int = 2
    """Times that a run goes back; 0: it ends instead."""
    spike_deviations: float = 8.0
    """Deviations above the median of the last steps' losses from which on a loss is too high; 0 looks for none."""

    def __post_init__(self) -> None:
        at = "guard."
        require(self.skips_to_roll_back >= 1, at + "skips_to_roll_back", self.skips_to_roll_back, "at least 1")
        require(0 < self.rollback_lr <= 1, at + "rollback_lr", self.rollback_lr, "0 < factor <= 1")
        require(self.max_rollbacks >= 0, at + "max_rollbacks", self.max_rollbacks, "0 or more")
        require(self.spike_deviations >= 0, at + "spike_deviations", self.spike_deviations, "0 or more")
