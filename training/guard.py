"""What is made of steps that were not finite, and of losses that are too high: said, counted, and gone back from.

A step that is not finite has moved nothing (`training.step`). Its host learns of it some steps later, as a GPU may be
that far behind, by numbers that every rank has alike: all ranks come to the same decision in the same step, without a
collective.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.guard import GuardConfig
from partial_fc.collectives import all_reduce_
from training.distributed import Ranks
from training.errors import TrainingError
from training.sharded import ShardedBackbone
from training.spikes import Spike, SpikeDetector
from training.step import StepValues

_LAG_GPU, _LAG_CPU = 4, 0
"""Steps until a step's numbers are read: so long a GPU may be behind its host, and nobody waits for it."""
_IDS, _RANKS, _IDS_OF_A_RANK = 8, 8, 2
"""Sample ids that a line names: of rows that are not finite; of ranks otherwise."""
_SPIKE_LASTS = 4
_CURE = "lower optim.lr, add optim.warmup_epochs, or use --set train.precision=fp32"


class RollBack(Exception):  # noqa: N818  an order, not an error
    """Going on makes no sense, on all ranks alike: go back to a checkpoint. The message says why."""


class _Reading(NamedTuple):
    """A step, and the numbers of it that are on their way: skipped, fault, total."""

    step: int
    lr: float
    numbers_3: Tensor
    here: torch.cuda.Event | None
    values: StepValues


class Guard:
    """One on every rank. skipped_steps, loss_spikes: since the run began; lr_factor: of all steps to come."""

    def __init__(
        self, config: GuardConfig, *, parameters: Sequence[str], ranks: Ranks, say: Callable[[str], None]
    ) -> None:
        """parameters: names of those of the backbone that are trained, in its order. say: takes a line for the log."""
        self._config, self._names, self._ranks, self._say = config, list(parameters), ranks, say
        self._cuda = ranks.device.type == "cuda"
        self._lag = _LAG_GPU if self._cuda else _LAG_CPU
        self._under_way: deque[_Reading] = deque()
        self._recent: deque[_Reading] = deque(maxlen=_SPIKE_LASTS)
        self._spikes = SpikeDetector(config.spike_deviations)
        self.skipped_steps, self.loss_spikes, self.rollbacks, self.lr_factor = 0, 0, 0, 1.0
        self._in_a_row = 0

    def take(self, step: int, lr: float, values: StepValues) -> None:
        """Optimizer step number `step` (from 0) has been queued. Raises RollBack. No collective, no wait.

        On GPUs what is looked at is the step some steps before.
        """
        numbers_3 = torch.stack([values.skipped, values.fault, values.total])
        here: torch.cuda.Event | None = None
        if self._cuda:
            host = torch.empty(3, pin_memory=True)
            numbers_3 = host.copy_(numbers_3, non_blocking=True)
            here = torch.cuda.Event()
            here.record()
        self._under_way.append(_Reading(step, lr, numbers_3, here, values))
        if len(self._under_way) > self._lag:
            self._look_at(self._under_way.popleft())

    def settle(self) -> None:
        """Look at the steps that are still under way, before state is saved. Waits for the GPU. Raises RollBack."""
        while self._under_way:
            self._look_at(self._under_way.popleft())

    def check_weights(self, backbone: nn.Module | ShardedBackbone, head: nn.Module) -> None:
        """Raises RollBack, on all ranks, when weights are not finite: every later step would be skipped.

        An update can overflow though loss and gradient did not. To be called before weights are saved. One all-reduce;
        waits for the GPU.
        """
        finite = torch.stack([_all_finite(module, self._ranks.device) for module in (backbone, head)])
        backbone_is, centres_are = all_reduce_(finite, self._ranks.group, dist.ReduceOp.MIN).tolist()
        if not (backbone_is and centres_are):
            raise RollBack(f"{'class centres' if backbone_is else 'weights of the backbone'} are not finite")

    def rolled_back(self, why: str, *, can: bool) -> None:
        """Count a return to a checkpoint, before it is made. can: whether there is a checkpoint to go back to.

        Raises TrainingError when that is not possible, or has been done often enough.
        """
        if not can:
            raise TrainingError(f"{why}, and there is no checkpoint of this run to go back to: {_CURE}")
        if self.rollbacks >= self._config.max_rollbacks:
            raise TrainingError(
                f"{why}, after guard.max_rollbacks = {self.rollbacks} returns to a checkpoint, the learning rate being "
                f"{self.lr_factor:g} of the schedule's: {_CURE}; the newest checkpoint is from before"
            )
        self.rollbacks += 1
        self.lr_factor *= self._config.rollback_lr
        self._in_a_row = 0
        self._under_way.clear()
        self._recent.clear()
        self._spikes.forget()

    def statistics(self) -> dict[str, float]:
        """Scalars for the log."""
        return {"guard/skipped_steps": float(self.skipped_steps), "guard/loss_spikes": float(self.loss_spikes)}

    def state_dict(self) -> dict[str, Any]:
        """Numbers and lists of numbers, the same on all ranks. Call `settle` first: what is under way is not in it."""
        return {
            "skipped_steps": self.skipped_steps,
            "loss_spikes": self.loss_spikes,
            "rollbacks": self.rollbacks,
            "lr_factor": self.lr_factor,
            "in_a_row": self._in_a_row,
            "spikes": self._spikes.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped_steps, self.loss_spikes = state["skipped_steps"], state["loss_spikes"]
        self.rollbacks, self.lr_factor = state["rollbacks"], state["lr_factor"]
        self._in_a_row = state["in_a_row"]
        self._spikes.load_state_dict(state["spikes"])
        self._under_way.clear()
        self._recent.clear()

    # ---- one step ----------------------------------------------------------------------------------------------

    def _look_at(self, reading: _Reading) -> None:
        if reading.here is not None:
            reading.here.synchronize()
        skipped, fault, total = reading.numbers_3.tolist()
        if not skipped:
            self._in_a_row = 0
            self._recent.append(reading)
            if (spike := self._spikes.add(total)) is not None:
                self.loss_spikes += 1
                self._tell_of_spike(spike)
        elif fault:
            self.skipped_steps += 1
            self._in_a_row += 1
            self._tell_of_skip(reading)
            if self._in_a_row >= self._config.skips_to_roll_back:
                raise RollBack(f"{self._in_a_row} steps in a row, up to step {reading.step + 1}, were not finite")

    def _tell_of_skip(self, reading: _Reading) -> None:
        if not self._ranks.is_main:
            return
        what = "the loss is not finite"
        if reading.values.total.isfinite():
            what = f"the loss is finite, {self._gradient(reading.values)}"
        self._say(
            f"step {reading.step + 1}: skipped, {what} (learning rate {reading.lr:.3g}); {self._rows(reading.values)}"
        )

    def _gradient(self, values: StepValues) -> str:
        """Backward runs from the last parameter to the first, and what is not finite spreads: the last is the cause."""
        bad = [name for name, norm in zip(self._names, values.norms_P.isfinite().tolist(), strict=True) if not norm]
        if not bad:
            return "the gradient's norm is beyond float32"
        return f"the gradient of {bad[-1]} is not, the first in backward" + f" of {len(bad)}" * (len(bad) > 1)

    def _tell_of_spike(self, spike: Spike) -> None:
        if not self._ranks.is_main:
            return
        first = self._recent[max(0, len(self._recent) - 1 - spike.began)]
        self._say(
            f"step {first.step + 1}: the loss leapt to {first.numbers_3[2]:.4g}, where {spike.usual:.4g} with a "
            f"deviation of {spike.deviation:.2g} was usual (learning rate {first.lr:.3g}); {self._rows(first.values)}"
        )

    def _rows(self, values: StepValues) -> str:
        """Which samples: those whose embeddings were not finite, or else the first of every rank."""
        ids_N = torch.cat([part_N.cpu() for part_N in values.sample_ids])
        bad_N = torch.cat([~part_N.isfinite().cpu() for part_N in values.row_sums])
        if bad_N.any():
            named = ids_N[bad_N].tolist()
            more = f" and {len(named) - _IDS} more" if len(named) > _IDS else ""
            return f"embeddings that are not finite: of samples {_listed(named[:_IDS])}{more}"
        ids_WB = values.sample_ids[0].view(self._ranks.world_size, -1)[:_RANKS, :_IDS_OF_A_RANK]
        return "first samples of each rank: " + "; ".join(_listed(row) for row in ids_WB.tolist())


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids))


@torch.no_grad()
def _all_finite(module: nn.Module | ShardedBackbone, device: torch.device) -> Tensor:
    """float32 scalar, 1 when all parameters and buffers are. Makes no copy of any."""
    largest = [
        torch.linalg.vector_norm(tensor.detach(), float("inf")).float()
        for tensor in (*module.parameters(), *module.buffers())
        if tensor.is_floating_point() and tensor.numel()
    ]
    if not largest:
        return torch.ones((), device=device)
    return torch.stack(largest).isfinite().all().float()
