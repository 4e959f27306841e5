"""A plan as tables, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from training.doctor.finding import size_text
from training.plan.advice import Advice
from training.plan.planner import Plan, Scenario

_MARK = " *"
"""Of what is assumed."""


def tell(console: Console, scenario: Scenario, plan: Plan, advices: Sequence[Advice], price: float) -> None:
    """Print all of it. price: of a GPU's hour, 0: not known."""
    console.print(_memory(scenario, plan))
    console.print(_time(plan))
    console.print(_run(scenario, plan, price))
    console.print(_advice(scenario, plan, advices, price))
    console.print(f"{_MARK.strip()} rests on what is assumed:", highlight=False)
    for note in plan.notes:
        console.print(f"- {note}", highlight=False, soft_wrap=True)


def _table(title: str, *headings: str) -> Table:
    table = Table(*headings, title=title, title_justify="left", pad_edge=False)
    table.columns[0].overflow = "fold"  # all of a setting that is to be typed
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _memory(scenario: Scenario, plan: Plan) -> Table:
    memory, free = plan.memory, scenario.device.memory
    table = _table(f"memory of a rank, on {scenario.device.name}", "part", "bytes", "when")
    for row in memory.rows:
        when = "" if len(row.when) == 4 else ", ".join(row.when)
        table.add_row(row.name + _MARK * row.assumed, size_text(row.bytes), when)
    table.add_section()
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    table.add_row(f"fullest, during {memory.fullest}", size_text(memory.peak), f"of {size_text(free)}: {verdict}")
    table.add_section()
    for name, size in memory.host:
        table.add_row(f"host: {name}", size_text(size), "of each rank")
    ranks = min(scenario.per_host, scenario.ranks)
    if scenario.device.cuda:
        together = ranks * sum(size for _, size in memory.host)
        table.add_row("host: all of it", size_text(together), f"of {ranks} ranks")
    return table


def _time(plan: Plan) -> Table:
    table = _table("time of a step", "part", "ms", "hidden ms")
    for part in plan.parts:
        hidden = f"{1e3 * part.hidden:.2f}" if part.hidden else ""
        table.add_row(part.name + _MARK * part.assumed, f"{1e3 * part.seconds:.2f}", hidden)
    table.add_section()
    table.add_row(f"a step; it waits for {plan.limit}", f"{1e3 * plan.step:.1f}", "")
    return table


def _run(scenario: Scenario, plan: Plan, price: float) -> Table:
    table = _table("the run", "", "")
    per_host = plan.images_per_s * min(scenario.per_host, scenario.ranks) / scenario.ranks
    hours = plan.total / 3600
    rows = [
        ("images a second", f"{plan.images_per_s:,.0f}"),
        ("decoding, of a host", f"{per_host:,.0f} images a second: {plan.cores:.1f} cores busy"),
        ("a step", f"{plan.images:,} images"),
        ("an epoch", f"{plan.steps_per_epoch:,} steps, {plan.total / scenario.config.train.epochs / 3600:.2f} hours"),
        ("all epochs", f"{plan.total_steps:,} steps, {hours:.1f} hours, {hours * scenario.ranks:,.0f} GPU hours"),
        ("a checkpoint", size_text(plan.checkpoint)),
    ]
    if scenario.config.clustering.enabled:
        rows.insert(3, ("a refresh of the clusters", f"{plan.refresh:.1f} s, shared out over steps"))
    if price:
        rows.append(("cost", f"{hours * scenario.ranks * price:,.0f}"))
    for name, text in rows:
        table.add_row(name, text)
    return table


def _advice(scenario: Scenario, plan: Plan, advices: Sequence[Advice], price: float) -> Table:
    title = "what else could be changed" if plan.fits else "what to change to fit"
    headings = ("change", "memory", "fits", "images a second", "hours", *(("cost",) if price else ()))
    table = _table(title, *headings)

    def add(what: str, one: Plan, ranks: int) -> None:
        hours = one.total / 3600
        cells = [what, size_text(one.memory.peak), "yes" if one.fits else "no"]
        cells += [f"{one.images_per_s:,.0f}", f"{hours:.1f}"]
        table.add_row(*cells, *([f"{hours * ranks * price:,.0f}"] if price else []))

    add("as it is", plan, scenario.ranks)
    table.add_section()
    for advice in advices:
        add(advice.what, advice.plan, advice.ranks)
    return table


def as_json(scenario: Scenario, plan: Plan, advices: Sequence[Advice], price: float) -> str:
    """Bytes, seconds and counts, unrounded."""
    hours = plan.total / 3600
    found: dict[str, Any] = asdict(plan) | {
        "gpu": scenario.device.name,
        "gpus": scenario.ranks,
        "memory_bytes": plan.memory.peak,
        "memory_available_bytes": scenario.device.memory,
        "fullest_moment": plan.memory.fullest,
        "images_per_s": plan.images_per_s,
        "hours": hours,
        "cost": hours * scenario.ranks * price if price else None,
        "advice": [
            {
                "change": one.what,
                "memory_bytes": one.plan.memory.peak,
                "fits": one.plan.fits,
                "images_per_s": one.plan.images_per_s,
                "hours": one.plan.total / 3600,
            }
            for one in advices
        ],
    }
    return json.dumps(found, indent=1)
