"""Whether all ranks hold the same data: each opens the set on its own, from the copy of its host."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch

from configs.data import DataConfig
from configs.load import to_dict
from configs.schema import ConfigError, RunConfig
from data.rec.records import RecordSet
from partial_fc.collectives import all_reduce_
from training.checks import open_records
from training.distributed import Ranks
from training.ranks.monitor import RECORDS


def open_same_records(config: DataConfig, ranks: Ranks) -> tuple[RecordSet, int]:
    """Open the training set, the same on all ranks; and `label_digest` of it.

    Raises what `open_records` and `refuse_different_sets` do.
    """
    ranks.monitor.at(0, RECORDS)
    records = open_records(config)
    ranks.monitor.at(0, "build")
    digest = label_digest(records)
    refuse_different_sets(records, digest, ranks)
    return records, digest


def label_digest(records: RecordSet) -> int:
    """Of all labels in their order, below 2^56."""
    digest = hashlib.blake2b(np.ascontiguousarray(records.labels).data, digest_size=7).digest()
    return int.from_bytes(digest, "little")


def facts_of(config: RunConfig, records: RecordSet, labels: int, images: int) -> dict[str, dict[str, Any]]:
    """What must agree between a run and the checkpoint that it goes on from: settings by section, and facts.

    labels: `label_digest`. images: of an optimizer step, over all ranks. As JSON gives them back.
    """
    of_records = {
        "classes": records.num_classes,
        "samples": records.num_samples,
        "labels": f"{labels:014x}",
    }
    facts = {"records": of_records, "step": {"images": images}, **to_dict(config)}
    as_json: dict[str, dict[str, Any]] = json.loads(json.dumps(facts))
    return as_json


def refuse_different_sets(records: RecordSet, labels: int, ranks: Ranks) -> None:
    """Raise ConfigError, on all ranks alike, unless all have as many images and classes and the same labels in order.

    Ranks of different sets would make epochs of different length, and wait for each other for ever, or give one
    person's images another's number. Images are not compared. labels: `label_digest`. One all-reduce of three numbers
    a rank.
    """
    mine = [records.num_samples, records.num_classes, labels]
    facts_W3 = torch.zeros(ranks.world_size, 3, dtype=torch.int64, device=ranks.device)
    facts_W3[ranks.rank] = torch.tensor(mine)
    rows = all_reduce_(facts_W3, ranks.group).tolist()
    other = next((rank for rank, row in enumerate(rows) if row != rows[0]), None)
    if other is None:
        return
    here, there = (f"{samples} images of {classes} identities" for samples, classes, _ in (rows[0], rows[other]))
    there += " with other labels" if here == there else ""
    raise ConfigError(
        f"data.path: ranks see different sets: rank 0 has {here}, rank {other} has {there}: expected the same copy on "
        "all hosts; `python -m data hash` beside the good one and `check` on the others find what differs"
    )
