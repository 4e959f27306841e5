"""Names of the labels of a record set."""

from __future__ import annotations

from data.rec.records import RecordSet


def identities(records: RecordSet) -> list[str]:
    """Names of all labels, as `python -m data pack folder` writes them beside the records; [] without."""
    if not records.has("identities.txt"):
        return []
    try:
        names = records.file("identities.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return names if len(names) == records.num_classes else []
