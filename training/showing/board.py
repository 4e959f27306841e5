"""What a run shows beside its scalars: contact sheets of classes, the embedding projector, a trace of some steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from backbones import Backbone
from clustering.service.service import ClusterService
from configs.schema import RunConfig
from data.rec.records import RecordSet
from training.distributed import Ranks
from training.showing.gallery import Gallery
from training.showing.metrics import RunLog
from training.showing.profiling import StepProfiler
from training.showing.projector import Projector
from training.verify import NamedSet


class Board:
    """All ranks make one, after a resumed run has its state, and call it alike. Nothing in it can end a run."""

    def __init__(
        self,
        config: RunConfig,
        records: RecordSet,
        sets: Sequence[NamedSet],
        service: ClusterService | None,
        ranks: Ranks,
        output: Path,
    ) -> None:
        """sets: for verification."""
        self._gallery = Gallery(records, service, ranks, classes=config.tensorboard.sheet_classes)
        self._projector = Projector(config, sets, ranks)
        self._profiler = StepProfiler(config.profile, ranks, output)

    def after_step(self, step: int, log: RunLog) -> None:
        """Call it after every step. One all-reduce after those in which clusters were published."""
        self._profiler.after_step(step, log)
        self._gallery.after_step(step, log)

    def finish(self, backbone: Backbone, step: int, log: RunLog) -> None:
        """After the last evaluation of a run that is done. One all-gather."""
        self._projector.show(backbone, step, log)

    def close(self, step: int, log: RunLog) -> None:
        """The run ends, be it done or not. No collective."""
        self._profiler.close(step, log)
        self._gallery.close()
