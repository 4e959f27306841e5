"""HTML pages that hold everything in themselves: no script, nothing loaded from anywhere, light and dark."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape

_STYLE = """
:root { --paper: #fbfaf8; --ink: #22252a; --soft: #5f6670; --line: #dedbd5; --box: #ffffff; --mark: #c4420f; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181c; --ink: #e4e6ea; --soft: #9aa2ad; --line: #32363d; --box: #1e2126; --mark: #ff8a5c; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .25rem; }
p { margin: .25rem 0 .75rem; max-width: 60rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 1rem 0; font-size: .9rem; }
dd { margin: 0; }
figure { margin: 0; }
figcaption { font-size: .8rem; }
figcaption, dt, th { color: var(--soft); }
table { border-collapse: collapse; width: 100%; background: var(--box); }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); font-size: .85rem;
  font-variant-numeric: tabular-nums; }
"""


def document(title: str, body: str, *, style: str) -> str:
    """A whole page. title: text; body: HTML, in which what strangers wrote is escaped; style: CSS beyond that of all
    pages. The page's own policy forbids everything but its style and pictures within it.
    """
    style = _STYLE + style
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{body}</body>\n</html>\n"
    )


def facts_list(facts: Sequence[tuple[str, str]]) -> str:
    """HTML of names and values."""
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(value)}</dd>' for name, value in facts)}</dl>"
