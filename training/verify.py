"""Verification while training: each set's pairs embedded on all ranks, compared, logged and drawn."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

import evaluation.verification as pairs_of_faces
from backbones import Backbone
from configs.schema import ConfigError, RunConfig
from data.errors import DataError
from data.rec.records import RecordSet
from data.verification_bin import VerificationSet
from evaluation.pairs import PairEmbeddings, embed_pairs, read_pairs
from evaluation.plots import Drawn, drawn, label, verification_figure
from training.distributed import Ranks
from training.errors import TrainingError
from training.showing.drawing import Drawing
from training.showing.metrics import RunLog, append_line
from training.stopping import StopRequest

_PATIENCE_S = 3.0
"""For pictures when a run ends before it is done: a signal leaves half a minute for all."""


class NamedSet(NamedTuple):
    """A verification set, and the name of its file without the end."""

    name: str
    pairs: VerificationSet


class Verification:
    """The verification sets of a run; reads them at once, so that a missing one shows before training begins."""

    def __init__(self, config: RunConfig, records: RecordSet, ranks: Ranks) -> None:
        """Raises DataError for a set that cannot be read, has fewer than ten pairs, or pairs of one kind only, and
        ConfigError for two sets of the same name.
        """
        self.sets = [NamedSet(Path(name).stem, read_pairs(records.file(name))) for name in config.eval.sets]
        names = [name for name, _ in self.sets]
        if len(set(names)) < len(names):
            raise ConfigError(f"eval.sets: expected files of different names, got {', '.join(config.eval.sets)}")
        self._batch_size, self._bf16 = config.eval.batch_size, config.train.precision == "bf16"
        self._ranks = ranks
        self._shown: dict[str, dict[str, pairs_of_faces.Verification]] = {}
        self._drawing = Drawing[Drawn]("curves")

    def run(self, backbone: Backbone, step: int, log: RunLog, output: Path, stop: StopRequest) -> float | None:
        """Evaluate after `step` optimizer steps; every rank takes part, rank 0 logs: mean accuracy of the sets, there.

        Writes a line for each set to verification.jsonl and its figures to TensorBoard. A thread draws roc_<set>.png,
        which shows the first evaluation of this process beside the newest: `show` hands it over. Collectives: one
        broadcast of the BatchNorm statistics, one all-gather of embeddings for each set. Raises TrainingError, on all
        ranks, when embeddings are not finite, and Stopped when all ranks are to stop, amid a set too.
        """
        if not self.sets:
            return None
        share_statistics(backbone, self._ranks.group)
        accuracies: list[float] = []
        for name, pairs in self.sets:
            embedded = self._embed(backbone, name, pairs, stop)
            if not (_finite(embedded.first_PD) and _finite(embedded.second_PD)):
                raise TrainingError(
                    f"embeddings of {name} are not finite after step {step}: the training has diverged; lower "
                    "optim.lr, or go on from an older checkpoint"
                )
            if self._ranks.is_main:
                result = pairs_of_faces.verify(*embedded)
                accuracies.append(result.accuracy)
                self._tell(name, result, step, log, output)
        return statistics.fmean(accuracies) if accuracies else None

    def show(self, *, within: float = 0.0) -> None:
        """Write and log the pictures that are drawn; wait for the others for so many seconds at most."""
        self._drawing.show(within=within)

    def close(self) -> None:
        """The run ends: the last pictures, if they are drawn in some seconds."""
        self._drawing.close(within=_PATIENCE_S)

    def _embed(self, backbone: Backbone, name: str, pairs: VerificationSet, stop: StopRequest) -> PairEmbeddings:
        group, size = self._ranks.group, self._batch_size

        def each() -> None:
            self._ranks.monitor.moved()  # progress: a large set may take longer than ranks wait for one that is silent
            stop.check()

        try:
            with torch.autocast(self._ranks.device.type, dtype=torch.bfloat16, enabled=self._bf16):
                return embed_pairs(backbone, pairs.images, pairs.same, batch_size=size, group=group, each=each)
        except DataError as error:  # the same on all ranks
            raise DataError(f"{name}: {error}") from None

    def _tell(self, name: str, result: pairs_of_faces.Verification, step: int, log: RunLog, output: Path) -> None:
        values = result.values()
        log.scalars(step, {f"verification/{name}/{key}": value for key, value in values.items()})
        line = json.dumps({"step": step, "set": name, **values})
        log.attempt("verification.jsonl", lambda: append_line(output / "verification.jsonl", line))
        shown = self._shown.setdefault(name, {})
        title = "untrained" if step == 0 else f"step {step}"
        self._shown[name] = dict([*list(shown.items())[:1], (title, result)])
        results, heading = self._shown[name], f"{label(name)}: {len(result.same_P)} pairs"

        def show(picture: Callable[[], Drawn]) -> None:
            try:
                made = picture()
            except Exception as error:  # whatever matplotlib raises
                log.say(f"{path}: cannot draw it ({type(error).__name__}: {error}): training goes on")
                return
            if log.attempt(path.name, lambda: path.write_bytes(made.png)):
                log.image(step, f"verification/{name}", made.pixels, elsewhere=True)

        path = output / f"roc_{name}.png"
        self._drawing.begin(lambda: drawn(verification_figure(results, title=heading)), show)
        tars = ", ".join(f"{key} {100 * value:.1f}%" for key, value in values.items() if key.startswith("tar"))
        log.say(f"step {step}: {name} accuracy {100 * result.accuracy:.2f}% ± {100 * result.accuracy_std:.2f}%, {tars}")


def share_statistics(backbone: torch.nn.Module, group: dist.ProcessGroup) -> None:
    """Give all ranks rank 0's floating-point buffers, which differ while they train.

    One broadcast. Evaluation and the saved weights then are those of one network, whatever the number of ranks.
    """
    buffers = [buffer for buffer in backbone.buffers() if buffer.is_floating_point()]
    if not buffers or dist.get_world_size(group) == 1:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.broadcast(flat, group=group, group_src=0)
    for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))


def _finite(x_PD: npt.NDArray[np.float32]) -> bool:
    return bool(np.isfinite(x_PD).all())
