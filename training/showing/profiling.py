"""A trace of some steps by torch.profiler, for Perfetto or chrome://tracing."""

from __future__ import annotations

import logging
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from configs.schema import ProfileConfig
from training.distributed import Ranks
from training.showing.metrics import RunLog

_log = logging.getLogger(__name__)


class StepProfiler:
    """Traces the steps that the settings name, on rank 0 or on all ranks. What fails in it never ends a run."""

    def __init__(self, config: ProfileConfig, ranks: Ranks, output: Path) -> None:
        """output: of the run; traces come into `profile` in it."""
        self._config, self._ranks, self._folder = config, ranks, output / "profile"
        self._due = bool(config.steps) and (ranks.is_main or config.all_ranks)
        self._done, self._first = 0, 0
        self._profile: profile | None = None

    def after_step(self, step: int, log: RunLog) -> None:
        """Call it after every step; `step` of them are done. No collective."""
        if not self._due:
            return
        self._done += 1
        try:
            if self._profile is not None:
                self._profile.step()
                if self._done == self._config.after + self._config.steps:
                    self._end(step, log)
            elif self._done >= self._config.after - 1:
                self._first = step + 2  # the next warms the profiler up
                self._begin()
        except Exception as error:  # Kineto's and CUPTI's own, a folder that cannot be written: say it and go on
            self._give_up(error, log)

    def close(self, step: int, log: RunLog) -> None:
        """The run ends after `step` steps: write what there is of a trace under way."""
        if self._due:
            try:
                self._end(step, log)
            except Exception as error:
                self._give_up(error, log)

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._ranks.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        plan = schedule(wait=0, warmup=1, active=self._config.steps, repeat=1)
        self._profile = profile(activities=activities, schedule=plan)
        self._profile.start()

    def _end(self, step: int, log: RunLog) -> None:
        trace, self._profile, self._due = self._profile, None, False
        if trace is not None:
            trace.stop()
        first = self._first
        if trace is None or self._done <= self._config.after:
            log.say(f"no profile: the run ended before profile.after = {self._config.after} steps were done")
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"steps_{first}-{step}_rank{self._ranks.rank}.json.gz"
        trace.export_chrome_trace(str(path))
        log.say(f"profile of steps {first} to {step}: {path} (open it in https://ui.perfetto.dev)")

    def _give_up(self, error: Exception, log: RunLog) -> None:
        self._profile, self._due = None, False
        line = f"{self._folder}: no profile ({error}); training goes on"
        if self._ranks.is_main:
            log.say(line)
        else:
            _log.warning("%s", line)
