"""What trainings have left: how far they came, how fast, their accuracy by set, and the settings that differ."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.load import read_yaml
from data.errors import DataError
from evaluation.embed.files import map_array
from evaluation.roc import Roc, roc_of

SPEED = "throughput/images_per_second"
FOLDER = "evaluation"
"""Within a run: where `python -m evaluation verify --out` is looked for."""
SCORES = "scores_{}.npy"
"""Of a set: float64 (P, 2), the cosine of each pair and whether it shows one person, 1 or 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SetHistory:
    """Lines of verification.jsonl: the last one, and the first of those with the highest accuracy."""

    last: dict[str, Any]
    best: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    name: str
    steps: int
    """Highest step in any file."""
    images_per_second: float | None
    """Median over the lines of metrics.jsonl."""
    sets: dict[str, SetHistory]
    settings: dict[str, Any]
    """section.field of config.yaml; empty without one."""
    curves: dict[str, Roc]
    """By set, where its pairs' scores are kept."""


def read_run(folder: Path) -> Run:
    """Read a training's output folder. A step that was made again after a stop counts as it was made last.

    Raises DataError when there is neither verification.jsonl nor metrics.jsonl, or a line is not as training writes it;
    ConfigError for settings that are no YAML. A last line without an end is one being written, and left out.
    """
    metrics, verification = folder / "metrics.jsonl", folder / "verification.jsonl"
    if not metrics.is_file() and not verification.is_file():
        raise DataError(f"{folder}: expected a training's output, with metrics.jsonl or verification.jsonl in it")
    logged, evaluated = (
        _lines(metrics, {"step": int}),
        _lines(verification, {"step": int, "set": str, "accuracy": float}),
    )
    speeds = [float(line[SPEED]) for line in logged if isinstance(line.get(SPEED), int | float)]
    settings = read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    return Run(
        name=str(folder),
        steps=max((line["step"] for line in [*logged, *evaluated]), default=0),
        images_per_second=statistics.median(speeds) if speeds else None,
        sets=_histories(evaluated),
        settings=_flat(settings),
        curves=_curves(folder),
    )


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs: a value for each, None where it has none."""
    names = sorted({name for run in runs for name in run.settings})
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def _histories(lines: Sequence[dict[str, Any]]) -> dict[str, SetHistory]:
    by_set: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        by_set.setdefault(line["set"], {})[line["step"]] = line
    ordered = {name: [steps[step] for step in sorted(steps)] for name, steps in by_set.items()}
    return {
        name: SetHistory(last=found[-1], best=max(found, key=lambda line: float(line["accuracy"])))
        for name, found in ordered.items()
    }


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, fields in settings.items():
        if isinstance(fields, Mapping):
            flat.update({f"{section}.{field}": value for field, value in fields.items()})
        else:
            flat[str(section)] = fields
    return flat


def _curves(folder: Path) -> dict[str, Roc]:
    before, after = SCORES.split("{}")
    curves = {}
    for place in (folder, folder / FOLDER):
        for path in sorted(place.glob(SCORES.format("*"))):
            scores_P2 = map_array(path, kinds="f", dimensions=2, what="scores and truths, float64 (pairs, 2)")
            if scores_P2.shape[1] != 2 or not np.isin(scores_P2[:, 1], (0, 1)).all():
                raise DataError(f"{path}: expected a score and a truth of 0 or 1 for each pair")
            try:
                roc = roc_of(scores_P2[:, 0].astype(np.float64), scores_P2[:, 1] == 1)
            except ValueError as error:
                raise DataError(f"{path}: {error}") from None
            curves[path.name.removeprefix(before).removesuffix(after)] = roc
    return curves


def _lines(path: Path, expected: Mapping[str, type]) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, which have all of these fields; none where there is no file."""
    if not path.is_file():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot read it ({error.strerror})") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected JSON lines in UTF-8") from None
    lines = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict) or not all(_is(content.get(key), kind) for key, kind in expected.items()):
            fields = ", ".join(expected)
            raise DataError(f"{path}: line {number}: expected a JSON object with {fields}, found {line:.60}")
        lines.append(content)
    return lines


def _is(value: Any, kind: type) -> bool:
    kinds = (int, float) if kind is float else (kind,)
    return isinstance(value, kinds) and not isinstance(value, bool)
