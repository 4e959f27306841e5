"""What a run leaves beside its logs: its settings at the beginning, weights and hardest classes at the end."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from clustering.service.class_report import ClassReport
from configs.load import to_yaml
from configs.schema import RunConfig
from data.files import appearing
from data.rec.records import RecordSet
from training.distributed import Ranks
from training.showing.metrics import RunLog
from training.weight_files import write_weights


def introduce(log: RunLog, config: RunConfig, records: RecordSet, ranks: Ranks, output: Path) -> None:
    """Write config.yaml, and tell the log what is trained on what."""
    settings = to_yaml(config)
    log.attempt("config.yaml", lambda: (output / "config.yaml").write_text(settings, encoding="utf-8"))
    log.text("config", f"```yaml\n{settings}```")
    log.text("versions", f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}")
    log.say(
        f"{records.num_samples} images of {records.num_classes} identities ({records.layout} records), "
        f"{ranks.world_size} rank(s) on {ranks.device.type}"
    )


def write_results(output: Path, weights: Mapping[str, Tensor], hardest: Sequence[ClassReport] | None) -> None:
    """backbone.pt, and classes.json where there are clusters; each whole or not at all. Raises DataError."""
    write_weights(weights, output / "backbone.pt")
    if hardest is not None:
        rows = [dataclasses.asdict(row) for row in hardest]
        with appearing([output / "classes.json"]) as (partial,):
            partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
