"""What to change, found by planning it: single settings, and the first ones together that fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from configs.schema import ConfigError
from training.plan.planner import Plan, Scenario, make_plan, with_settings

Change = Callable[[Scenario], Scenario]
_AND = " --set "


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """A change, and the plan with it."""

    what: str
    """As one types it after --set; other numbers of GPUs are options of their own."""
    plan: Plan
    ranks: int


def _changes(scenario: Scenario) -> Iterator[tuple[str, Change]]:
    """Those that change something; the ones that cost least come first."""
    config = scenario.config
    head, model, train, clusters = config.head, config.model, config.train, config.clustering
    if head.centre_dtype == "fp32" and head.missed_steps == "skip":
        yield "head.centre_dtype=bf16", lambda s: with_settings(s, head={"centre_dtype": "bf16"})
    if train.precision == "fp32" and scenario.device.cuda:
        kind = "bf16" if scenario.device.bf16 else "fp16"
        yield f"train.precision={kind}", lambda s: with_settings(s, train={"precision": kind})
    if model.graph:
        yield "model.graph=false", lambda s: with_settings(s, model={"graph": False})
    if model.recompute < 1:
        yield "model.recompute=1", lambda s: with_settings(s, model={"recompute": 1.0})
    if head.sample_rate > 0.1:
        yield "head.sample_rate=0.1", lambda s: with_settings(s, head={"sample_rate": 0.1})
    if head.wire_dtype == "fp32" and scenario.ranks > 1:
        yield "head.wire_dtype=bf16", lambda s: with_settings(s, head={"wire_dtype": "bf16"})
    if model.shard == "none" and scenario.ranks > 1 and not model.compile:
        yield "model.shard=host", lambda s: with_settings(s, model={"shard": "host"})
    batch, accumulation = train.share(scenario.ranks)
    if batch % 2 == 0 and batch > 2:
        half: dict[str, int] = {"batch_size": batch // 2}
        if not train.global_batch:  # which shares a step's images out by itself
            half["accumulation"] = 2 * accumulation
        yield _AND.join(f"train.{name}={value}" for name, value in half.items()), lambda s: with_settings(s, train=half)
    if clusters.enabled:
        if clusters.extra_clusters > 0.05:
            yield "clustering.extra_clusters=0.05", lambda s: with_settings(s, clustering={"extra_clusters": 0.05})
        rarer = 2 * clusters.refresh_epochs
        what = f"clustering.refresh_epochs={rarer:g}"
        yield what, lambda s: with_settings(s, clustering={"refresh_epochs": rarer})
        yield "clustering.enabled=false", lambda s: with_settings(s, clustering={"enabled": False})
    for factor in (2, 4):
        ranks = factor * scenario.ranks
        yield f"--gpus {ranks}", lambda s, ranks=ranks: replace(s, ranks=ranks)  # type: ignore[misc]


def advise(scenario: Scenario, plan: Plan) -> list[Advice]:
    """Each change alone; and, where the plan does not fit and none alone makes it fit, the least that do together.

    Together: changes are taken in turn, each kept that lowers the fullest moment, until all fits.
    """
    found, changes = [], list(_changes(scenario))
    for what, change in changes:
        try:
            changed = change(scenario)
            found.append(Advice(what=what, plan=make_plan(changed), ranks=changed.ranks))
        except ConfigError:  # a setting that another one rules out
            continue
    if plan.fits or any(one.plan.fits for one in found):
        return found
    names: list[str] = []
    best, now = plan, scenario
    for what, change in changes:
        try:
            wanted = change(now)
            tried = make_plan(wanted)
        except ConfigError:
            continue
        if tried.memory.peak < 0.99 * best.memory.peak:
            names, best, now = [*names, what], tried, wanted
        if best.fits:
            break
    return [*found, Advice(what=_together(names), plan=best, ranks=now.ranks)] if names else found


def _together(names: list[str]) -> str:
    """Of several numbers of GPUs the last one, behind the settings."""
    settings = [name for name in names if not name.startswith("--gpus")]
    return " ".join([_AND.join(settings), *[name for name in names if name.startswith("--gpus")][-1:]]).strip()
