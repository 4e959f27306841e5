"""The report as one HTML page: findings with their pictures inside, no script, nothing loaded from anywhere.

Names of classes and folders come from strangers: all text is escaped, and the page's own policy forbids everything but
its style and pictures in it.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from clustering.commands.page_style import STYLE
from clustering.report.findings import Copy, Duplicate, Findings, LabelState, Noise, Split
from data.page import document, facts_list

NOISE_ROWS, GROUP_ROWS, COPY_ROWS, LABEL_ROWS = 60, 25, 30, 20
"""Findings of each kind that are shown; the CSV files have all."""
_PICTURES = 7
"""Of a label beside a single image."""
_ROW = 12
"""Of a label or group in a row of its own."""

Thumbnail = Callable[[int], "bytes | None"]
"""Sample to the bytes of a small JPEG, None for an image that cannot be shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What the page shows beside the findings."""

    title: str
    facts: Sequence[tuple[str, str]]
    """(name, value) lines about the input."""
    warnings: Sequence[str]
    samples_of: Callable[[int], Sequence[int]]
    """Samples of a label that no finding speaks of, some 12 of them."""
    name_of: Callable[[int], str]
    """What to call a label."""
    thumbnail: Thumbnail | None
    """None: there are no pictures."""
    clean: str
    """The command that acts on the findings, for the reader to copy; "" without records."""


def render(findings: Findings, view: View) -> str:
    """The whole page."""
    f = findings
    sections = [
        _summary(f, view),
        _section(
            "noise",
            "Suspected wrong labels",
            "The image on the left lies apart from its label. <b>closed</b>: it looks like another label; <b>open</b>: "
            "like none. The score is how much closer it is to that label than to its own.",
            [_noise(row, view) for row in f.noise[:NOISE_ROWS]],
            len(f.noise),
        ),
        _section(
            "duplicates",
            "Duplicate identities",
            "Two labels that look like one person. The ratio compares the cosine between them with that within "
            "them: 1 for one person. The score takes off half of their ratio to their next look-alikes.",
            [_duplicate(row, view) for row in f.duplicates[:GROUP_ROWS]],
            len(f.duplicates),
        ),
        _section(
            "splits",
            "Split identities",
            "One label with groups that look like different persons, or one person in two quite different conditions. "
            "The score is 1 for strangers.",
            [_split(row, view) for row in f.splits[:GROUP_ROWS]],
            len(f.splits),
        ),
        _section(
            "copies",
            "Copies",
            "The same picture again, under the same label or another one.",
            ['<div class="pairs">' + "".join(_copy(row, view) for row in f.copies[:COPY_ROWS]) + "</div>"]
            if f.copies
            else [],
            len(f.copies),
            shown=min(COPY_ROWS, len(f.copies)),
        ),
        _section(
            "classes",
            "Hardest labels",
            "Labels that k-means finds scattered or mixed with others, by the hard level of the method.",
            [_label_table(f.labels[:LABEL_ROWS], view)],
            len(f.labels),
            shown=min(LABEL_ROWS, len(f.labels)),
        ),
    ]
    return document(view.title, "".join(sections), style=STYLE)


def _summary(f: Findings, view: View) -> str:
    open_set = sum(row.kind == "open" for row in f.noise)
    across = sum(row.label != row.label_of for row in f.copies)
    cards = [
        (
            "noise",
            len(f.noise),
            "wrong labels",
            f"{len(f.noise) - open_set} look like another label, {open_set} like none",
        ),
        ("duplicates", len(f.duplicates), "duplicate identities", "pairs of labels that look like one person"),
        ("splits", len(f.splits), "split identities", f"groups apart, under {len({r.label for r in f.splits})} labels"),
        ("copies", len(f.copies), "copies", f"{across} of them under another label"),
    ]
    boxes = "".join(
        f'<a class="card" href="#{anchor}"><b>{count:,}</b> {name}<small>{about}</small></a>'
        for anchor, count, name, about in cards
    )
    warnings = "".join(f'<p class="warning">{escape(text)}</p>' for text in view.warnings)
    steps = (
        "<h2>What to do next</h2><ol><li>Look through the findings below; the worst come first.</li>"
        "<li>Delete the rows that you do not agree with from <code>noise.csv</code>, <code>duplicates.csv</code>, "
        "<code>splits.csv</code> and <code>copies.csv</code> beside this page. They hold all findings.</li>"
    )
    if view.clean:
        steps += (
            "<li>Write a cleaned set; the original stays as it is. <code>--dry-run</code> only counts: "
            f"<pre>{escape(view.clean)}</pre></li>"
        )
    else:
        steps += "<li>Correct your labels by these files, or report again with <code>--records</code>.</li>"
    return f'{warnings}<div class="cards">{boxes}</div>\n{facts_list(view.facts)}\n{steps}</ol>\n'


def _section(anchor: str, title: str, about: str, rows: Sequence[str], total: int, *, shown: int | None = None) -> str:
    shown = len(rows) if shown is None else shown
    count = f"all {total:,}" if shown == total else f"the first {shown:,} of {total:,}; all are in {anchor}.csv"
    body = "".join(rows) if rows else "<p>None found.</p>"
    said = f' <span class="count">{count}</span>' if total else ""
    return f'<section id="{anchor}"><h2>{title}{said}</h2><p class="about">{about}</p>\n{body}</section>\n'


def _noise(row: Noise, view: View) -> str:
    right = ""
    if row.looks_like >= 0:
        right = _strip(f"looks like {_label(row.looks_like, view)}", view.samples_of(row.looks_like)[:_PICTURES], view)
    gate = ", suspect to the gate too" if row.gate else ""
    return (
        f'<article><header><b class="score">{row.score:.2f}</b> <span class="kind">{row.kind}</span> '
        f"closeness {row.own:.2f} to its own label, {row.other:.2f} to the nearest other{gate}</header>"
        f'<div class="parts">{_strip(f"sample {row.sample}", [row.sample], view, mark="suspect")}'
        f"{_strip(f'its label {_label(row.label, view)}', view.samples_of(row.label)[:_PICTURES], view)}{right}</div>"
        "</article>\n"
    )


def _duplicate(row: Duplicate, view: View) -> str:
    rows = "".join(
        _strip(f"label {_label(label, view)}, {samples} samples", view.samples_of(label)[:_ROW], view)
        for label, samples in ((row.label, row.samples), (row.other_label, row.other_samples))
    )
    return (
        f'<article><header><b class="score">{row.score:.2f}</b> ratio {row.ratio:.2f}</header>'
        f'<div class="rows">{rows}</div></article>\n'
    )


def _split(row: Split, view: View) -> str:
    like = f", looks like {_label(row.looks_like, view)}" if row.looks_like >= 0 else ""
    rows = _strip(f"largest group, {row.largest} samples", view.samples_of(row.label)[:_ROW], view)
    rows += _strip(f"group {row.group}, {len(row.samples)} samples{like}", row.samples[:_ROW], view, mark="suspect")
    return (
        f'<article><header><b class="score">{row.score:.2f}</b> label {_label(row.label, view)}</header>'
        f'<div class="rows">{rows}</div></article>\n'
    )


def _copy(row: Copy, view: View) -> str:
    same = {True: "same bytes", False: "encoded anew", None: ""}[row.same_bytes]
    across = "" if row.label == row.label_of else f'<span class="kind">labels {row.label_of} and {row.label}</span>'
    about = " ".join(part for part in (f"cosine {row.score:.4f}", same, across) if part)
    pictures = _pictures([row.copy_of, row.sample], view, "")
    return f'<figure><div class="strip">{pictures}</div><figcaption>{about}</figcaption></figure>'


def _label_table(rows: Iterable[LabelState], view: View) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("label", "hard level", "F", "cohesion", "samples", "suspects", ""))
    lines = "".join(
        f"<tr><td>{_label(row.label, view)}</td><td>{row.hard_level:.3f}</td><td>{row.agreement:.2f}</td>"
        f"<td>{row.cohesion:.2f}</td><td>{row.samples}</td><td>{row.suspects}</td>"
        f'<td><div class="strip">{_pictures(view.samples_of(row.label)[:_ROW], view, "")}</div></td></tr>'
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>\n"


def _label(label: int, view: View) -> str:
    name = view.name_of(label)
    return f"{label}" if not name else f"{label} ({escape(name)})"


def _strip(caption: str, samples: Sequence[int], view: View, mark: str = "") -> str:
    """caption: HTML."""
    return (
        f'<figure><figcaption>{caption}</figcaption><div class="strip">{_pictures(samples, view, mark)}</div></figure>'
    )


def _pictures(samples: Sequence[int], view: View, mark: str) -> str:
    return "".join(_picture(int(sample), view, mark) for sample in samples)


def _picture(sample: int, view: View, mark: str) -> str:
    image = None if view.thumbnail is None else view.thumbnail(sample)
    if image is None:
        return f'<span class="none {mark}">{sample}</span>'
    about = f"sample {sample}"
    data = base64.b64encode(image).decode()
    source = f"data:image/jpeg;base64,{data}"
    return f'<img class="{mark}" width="64" height="64" title="{about}" alt="{about}" src="{source}">'
