"""How the report's page looks, in the light and in the dark."""

from __future__ import annotations

STYLE = """
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
.about, .count, small, figcaption, dt, header, th { color: var(--soft); }
.count { font-size: .9rem; font-weight: normal; }
.warning { border-left: 4px solid var(--mark); padding: .5rem .75rem; background: var(--box); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .75rem; }
.card { display: block; padding: .75rem 1rem; background: var(--box); border: 1px solid var(--line); border-radius: 8px;
  color: inherit; text-decoration: none; }
.card:hover, .card:focus { border-color: var(--mark); }
.card b { font-size: 1.5rem; margin-right: .25rem; }
.card small { display: block; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 1rem 0; font-size: .9rem; }
dd { margin: 0; }
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
figure { margin: 0; }
figcaption { font-size: .8rem; }
.strip { display: flex; flex-wrap: wrap; gap: 3px; min-height: 64px; }
.strip img, .none { width: 64px; height: 64px; border-radius: 4px; display: block; }
.none { background: var(--line); color: var(--soft); font-size: .75rem; display: grid; place-items: center; }
.suspect { outline: 3px solid var(--mark); outline-offset: -3px; }
table { border-collapse: collapse; width: 100%; background: var(--box); }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); font-size: .85rem;
  font-variant-numeric: tabular-nums; }
"""
