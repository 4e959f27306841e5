"""Does the capacity planner tell memory and time of a training step, against what is measured on this machine?

Every configuration runs in processes of its own, on one thread. Factors of a CPU (`training.plan.rates.CPU_FACTORS`)
are fitted to the rows marked "fit"; the others test them. What GPUs measured before stands in committed results, and is
planned beside it. A row is measured once: with `--out`, those that the file's JSON has already are only planned anew.

Legend: B images of a micro-batch, D embedding size, C classes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.measuring.report import digits, facts, publish
from benchmarks.planning.child import memory_of, time_of
from benchmarks.planning.fit import fit_factors
from benchmarks.planning.gpus import gpu_rows, others_rows
from configs.load import load_config
from training.plan.devices import CPU, device_of
from training.plan.links import BETWEEN
from training.plan.planner import Dataset, Plan, Scenario, make_plan
from training.plan.work import Resource

HEADER = ("for", "configuration", "what", "predicted", "measured", "ratio", "within")
MEMORY, TIME = 0.15, 0.30
"""How far a plan may be off."""
_PLAIN = ("train.precision=fp32", "clustering.enabled=false", "data.threads=1")
_GUIDED = ("train.precision=fp32", "clustering.refresh_span=1", "data.threads=1")
_LOSSES_ON = ("clustering.warmup_fraction=0", "clustering.ramp_fraction=0")


class Case(NamedTuple):
    """A training."""

    role: str
    classes: int
    samples: int
    settings: tuple[str, ...]

    @property
    def name(self) -> str:
        words = [text.partition("=")[2] if "backbone" in text else text.partition(".")[2] for text in self.settings]
        left_out = ("precision=fp32", "threads=1", "refresh_span=1", "warmup_fraction=0", "ramp_fraction=0")
        return f"C={self.classes:,} " + " ".join(word for word in words if word not in left_out)


def _case(
    role: str, classes: int, samples: int, net: str, dim: int, batch: int, *more: str, guided: bool = False
) -> Case:
    own = (f"model.backbone={net}", f"model.embedding_size={dim}", f"train.batch_size={batch}")
    return Case(role, classes, samples, (*own, *((*_GUIDED, *_LOSSES_ON) if guided else _PLAIN), *more))


CASES = (
    _case("fit", 1000, 10_000, "iresnet18", 512, 8),
    _case("fit", 1000, 10_000, "mobilefacenet", 512, 16),
    _case("fit", 1000, 10_000, "vit_t", 512, 8),
    _case("fit", 50_000, 100_000, "small", 512, 128),
    _case("fit", 400_000, 400_000, "small", 512, 128, "head.sample_rate=0.05"),
    _case("fit", 4000, 40_000, "small", 128, 64, guided=True),
    _case("test", 93_431, 100_000, "iresnet50", 512, 8),
    _case("test", 10_000, 100_000, "iresnet34", 256, 8, "model.recompute=1", "train.accumulation=2"),
    _case("test", 360_232, 400_000, "small", 256, 64),
    _case("test", 1_000_000, 1_000_000, "small", 256, 128, "head.sample_rate=0.02"),
    _case("test", 10_000, 100_000, "vit_s", 512, 4),
    _case("test", 50_000, 100_000, "mobilefacenet", 256, 32, "optim.name=adamw"),
    _case("test", 100_000, 100_000, "small", 256, 64, "head.centre_dtype=bf16"),
    _case("test", 30_000, 100_000, "small", 128, 64, "head.subcentres=3"),
    _case("test", 8000, 60_000, "small", 256, 64, guided=True),
)


def planned(case: Case, reference: dict[Resource, float]) -> tuple[Plan, Scenario]:
    """The plan of a case on a CPU that is as fast as the reference says."""
    config = load_config(None, case.settings)
    labels = np.arange(case.samples, dtype=np.int64) % case.classes
    dataset = Dataset(classes=case.classes, samples=case.samples, labels=labels)
    network = BETWEEN["ethernet-25"]
    device = device_of(CPU)
    scenario = Scenario(
        config=config, dataset=dataset, ranks=1, per_host=1, device=device, network=network, reference=reference
    )
    return make_plan(scenario), scenario


def seconds_of(plan: Plan) -> float:
    """Of a step; the loader is not run here."""
    return sum(part.seconds for part in plan.parts)


def rows_of(case: Case, measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Memory and time of a case, predicted and measured."""
    step, reference = pooled(measured)
    plan, scenario = planned(case, reference)
    # The process has no loader and writes no checkpoint; its labels are there.
    labels = 8 * scenario.sizes.samples
    both = (("MB", plan.memory.peak + labels, measured["peak"], MEMORY), ("CPU s a step", seconds_of(plan), step, TIME))
    return [
        {
            "for": case.role,
            "configuration": case.name,
            "what": what,
            "predicted": predicted,
            "measured": found,
            "limit": limit,
        }
        for what, predicted, found, limit in both
    ]


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The texts of a row, as HEADER names them."""
    scale = 1e-6 if row["what"] == "MB" else 1.0
    ratio = row["predicted"] / row["measured"]
    within = 1 - row["limit"] <= ratio <= 1 + row["limit"]
    numbers = (digits(row["predicted"] * scale), digits(row["measured"] * scale))
    return (row["for"], row["configuration"], row["what"], *numbers, f"{ratio:.2f}", "yes" if within else "NO")


def _told(rows: Sequence[dict[str, Any]]) -> str:
    """How many rows of a kind are within the limits, and the median of how far they are off."""
    off = [abs(row["predicted"] / row["measured"] - 1) for row in rows]
    good = sum(distance <= row["limit"] for distance, row in zip(off, rows, strict=True))
    middle, most = 100 * statistics.median(off), 100 * max(off)
    return f"{good} of {len(rows)} within the limit, {middle:.0f}% off in the median, {most:.0f}% at most"


def _measure(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By the name of the case: memory, and a list of rounds; what was measured before is kept."""
    store = None if args.out is None else args.out.with_suffix(".json")
    found: dict[str, dict[str, Any]] = {}
    if store is not None and store.is_file():
        found = {row["name"]: row["measured"] for row in json.loads(store.read_text(encoding="utf-8"))["rows"]}
    for turn in range(args.rounds):
        for case in CASES:
            one = found.setdefault(case.name, {"rounds": []})
            if len(one["rounds"]) > turn:
                continue
            print(f"round {turn + 1}: {case.name}", file=sys.stderr, flush=True)
            if "peak" not in one:
                one |= memory_of(case._asdict())
            one["rounds"].append(time_of(case._asdict(), steps=args.steps))
            if store is not None:
                store.write_text(json.dumps({"rows": _stored(found)}), encoding="utf-8")
    return found


def _stored(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"name": name, "measured": one} for name, one in found.items() if one["rounds"]]


def pooled(measured: dict[str, Any]) -> tuple[float, dict[Resource, float]]:
    """Median seconds of a step over all rounds, and of the reference's rates."""
    rounds = measured["rounds"]
    step = statistics.median(seconds for one in rounds for seconds in one["seconds"])
    return step, {name: statistics.median(one["reference"][name] for one in rounds) for name in rounds[0]["reference"]}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each configuration, default 3")
    parser.add_argument("--rounds", type=int, default=2, help="through all of them, default 2")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result there, in Markdown; JSON beside it")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when done, 2 when an argument is not as expected."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    args = parser.parse_args(arguments)
    if min(args.steps, args.rounds) < 1:
        parser.error("expected --steps and --rounds of at least 1")
    torch.set_num_threads(1)
    about = facts(torch.device("cpu"), "benchmarks.planner", arguments)
    measured = _measure(args)
    rows = [row for case in CASES for row in rows_of(case, measured[case.name])]
    for role in ("fit", "test"):
        for what in ("MB", "CPU s a step"):
            about[f"{role}, {what}"] = _told([row for row in rows if (row["for"], row["what"]) == (role, what)])
    on_gpus = gpu_rows()
    on_gpus += others_rows()
    for role in ("GPU, fit", "GPU, test", "others"):
        about[role] = _told([row for row in on_gpus if row["for"] == role])
    fitted = [(case, *pooled(measured[case.name])) for case in CASES if case.role == "fit"]
    factors = fit_factors([(planned(case, reference)[1], step, reference) for case, step, reference in fitted])
    about["factors fitted"] = ", ".join(f"{name} {value:.3g}" for name, value in factors.items())
    about["work"] = (
        f"CPU seconds of one thread, medians of {args.rounds} rounds of {args.steps} steps after 1 of warm-up, each "
        "round in a new process; memory in another one"
    )
    publish(
        "Capacity planner: predicted and measured",
        HEADER,
        [cells(row) for row in (*rows, *on_gpus)],
        about=about,
        rows=_stored(measured),
        out=args.out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
