"""Results of an evaluation as one HTML page: figures, pictures, and how they were measured.

Names of sets and files come from strangers: all text is escaped (`data.page` for what the page may load).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from data.page import document, facts_list

_STYLE = """
.scroll, .frame { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; background: var(--box); }
.scroll table { overflow-wrap: normal; }
.figures td { white-space: nowrap; }
.number { text-align: right; }
tbody tr:last-child td { border-bottom: 0; }
ul { margin: .5rem 0; padding-left: 1.2rem; max-width: 60rem; }
.notes { color: var(--soft); font-size: .85rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); gap: 1rem; }
.pictures img { width: 100%; height: auto; display: block; }
@media (prefers-color-scheme: dark) { .pictures img { filter: invert(.9) hue-rotate(180deg); } }
@media (max-width: 40rem) {
  body { padding: .7rem; }
  dl { grid-template-columns: 1fr; }
  dd { margin-bottom: .4rem; }
  th, td { padding: .25rem .35rem; font-size: .8rem; }
}
"""
_NUMBER = re.compile(r"[-+0-9.…e% ]*")


class Table(NamedTuple):
    """The first column is text. notes: such as why a figure is missing. figures: columns of numbers are to be compared
    from top to bottom, and stand at the right.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    figures: bool = True


class Summary(NamedTuple):
    """What the page says, all of it text. facts: names and values. method: sentences."""

    title: str
    facts: Sequence[tuple[str, str]]
    tables: Sequence[Table]
    method: Sequence[str]


def render(summary: Summary, pictures: Mapping[str, bytes]) -> str:
    """The whole page. pictures: PNG by the name of its file."""
    parts = [facts_list(summary.facts), *map(_table, summary.tables)]
    if pictures:
        figures = "".join(_picture(name, content) for name, content in pictures.items())
        parts.append(f'<section><h2>Pictures</h2><div class="pictures">\n{figures}</div></section>')
    parts.append(f"<section><h2>How it was measured</h2>{_list(summary.method)}</section>")
    return document(summary.title, "".join(f"{part}\n" for part in parts), style=_STYLE)


def _table(table: Table) -> str:
    columns = zip(*table.rows, strict=True)
    kinds = [' class="number"' if table.figures and all(map(_NUMBER.fullmatch, column)) else "" for column in columns]
    kinds = kinds or [""] * len(table.header)
    kind = ' class="figures"' if table.figures else ""
    head = _cells("th", kinds, table.header)
    rows = "".join(f"<tr>{_cells('td', kinds, row)}</tr>\n" for row in table.rows)
    notes = _list(table.notes, ' class="notes"') if table.notes else ""
    return (
        f'<section><h2>{escape(table.title)}</h2><div class="scroll"><table{kind}><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>{notes}</section>"
    )


def _cells(tag: str, kinds: Sequence[str], texts: Sequence[str]) -> str:
    return "".join(f"<{tag}{kind}>{escape(text)}</{tag}>" for kind, text in zip(kinds, texts, strict=True))


def _list(texts: Sequence[str], kind: str = "") -> str:
    return f"<ul{kind}>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"


def _picture(name: str, content: bytes) -> str:
    data = base64.b64encode(content).decode()
    about = escape(name)
    image = f'<div class="frame"><img alt="{about}" src="data:image/png;base64,{data}"></div>'
    return f"<figure>{image}<figcaption>{about}</figcaption></figure>\n"
