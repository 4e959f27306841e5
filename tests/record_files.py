"""Small sets in a folder, for tests: each layout, with whatever label, header or index a test wants wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.rec.header import Header, pack
from data.rec.index import Index, write_index
from data.rec.recordio import RecordWriter

Record = tuple[int, bytes]
"""(key, payload)"""


def image_record(key: int, labels: Sequence[float], image: bytes = b"image", *, flag: int | None = None) -> Record:
    flag = (0 if len(labels) == 1 else len(labels)) if flag is None else flag
    return key, pack(Header(flag, tuple(labels), key, 0), image)


def insightface_records(counts: Sequence[int], *, key_0_first: bool = False) -> list[Record]:
    """Records of `counts[c]` images of each class c: images, identity headers, key 0; or key 0 before the headers, as
    face2rec2 has it.
    """
    labels = np.repeat(np.arange(len(counts)), counts).tolist()
    records = [image_record(key, [label], f"image {key}".encode()) for key, label in enumerate(labels, start=1)]
    ends = 1 + np.cumsum(counts)
    start = int(ends[-1])
    pairs = enumerate(zip(counts, ends, strict=True))
    headers = [image_record(start + label, [end - count, end], b"") for label, (count, end) in pairs]
    key_0 = image_record(0, [start, start + len(counts)], b"")
    return [*records, key_0, *headers] if key_0_first else [*records, *headers, key_0]


def write_set(folder: Path, records: Sequence[Record], *, classes: int, extra: str = "") -> Path:
    """train.rec, train.idx and property; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with RecordWriter(folder / "train.rec") as writer:
        offsets = [writer.write(payload) for _, payload in records]
    keys = np.array([key for key, _ in records], np.int64)
    write_index(folder / "train.idx", Index(keys, np.array(offsets, np.int64)))
    (folder / "property").write_text(f"{classes},112,112\n{extra}")
    return folder
