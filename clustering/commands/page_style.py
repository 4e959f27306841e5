"""How the report's page looks, beyond `data.page`."""

from __future__ import annotations

STYLE = """
.about, .count, small, header { color: var(--soft); }
.count { font-size: .9rem; font-weight: normal; }
.warning { border-left: 4px solid var(--mark); padding: .5rem .75rem; background: var(--box); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .75rem; }
.card { display: block; padding: .75rem 1rem; background: var(--box); border: 1px solid var(--line); border-radius: 8px;
  color: inherit; text-decoration: none; }
.card:hover, .card:focus { border-color: var(--mark); }
.card b { font-size: 1.5rem; margin-right: .25rem; }
.card small { display: block; }
pre, code { font: 13px/1.5 ui-monospace, monospace; }
pre { padding: .6rem .8rem; background: var(--box); border: 1px solid var(--line); border-radius: 6px;
  white-space: pre-wrap; }
article { padding: .6rem .8rem; margin: .6rem 0; background: var(--box); border: 1px solid var(--line);
  border-radius: 8px; }
header { font-size: .85rem; margin-bottom: .35rem; }
.score { color: var(--ink); font-size: 1rem; margin-right: .35rem; }
.kind { color: var(--mark); font-weight: 600; margin-right: .35rem; }
.parts, .pairs { display: flex; flex-wrap: wrap; gap: .6rem 1.5rem; }
.parts figure:first-child { min-width: 6.5rem; }
.rows figure + figure { margin-top: .5rem; }
.strip { display: flex; flex-wrap: wrap; gap: 3px; min-height: 64px; }
.strip img, .none { width: 64px; height: 64px; border-radius: 4px; display: block; }
.none { background: var(--line); color: var(--soft); font-size: .75rem; display: grid; place-items: center; }
.suspect { outline: 3px solid var(--mark); outline-offset: -3px; }
"""
