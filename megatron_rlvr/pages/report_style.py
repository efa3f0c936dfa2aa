"""The look of report.html: light and dark, one column on a phone, as many as fit elsewhere."""

from __future__ import annotations

STYLE = """
:root {
  --page: #f6f7f9; --card: #ffffff; --ink: #1b2430; --muted: #5c6875; --grid: #e1e5ea; --focus: #1f66d1;
  --right: #1c7a4f; --wrong: #b4322f;
  --c1: #2a6fdb; --c2: #e08a1e; --c3: #2f9e73; --c4: #8a5bd1; --c5: #d1477a;
  --c6: #1897ad; --c7: #8a6240; --c8: #9ba12a; --c9: #a8322f; --c10: #3a4f8f; --rest: #9aa4b0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --card: #1a2028; --ink: #e6eaf0; --muted: #9aa6b4; --grid: #2c3541; --focus: #7fb2ff;
    --right: #5bcb98; --wrong: #ff8a84;
    --c1: #6ea8ff; --c2: #f0a850; --c3: #58c79b; --c4: #b596f2; --c5: #f2809f;
    --c6: #4fc3d6; --c7: #c09a76; --c8: #c9cf5a; --c9: #e06c62; --c10: #8496d8; --rest: #6d7884;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
header, main { max-width: 80rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 2rem; }
main { padding-bottom: 3rem; }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }
header p { margin: .4rem 0 1.5rem; color: var(--muted); }
h2 { margin: 0; font-size: 1rem; }
section { margin-top: 1rem; }
section > h2 { margin: 2rem 0 .75rem; font-size: 1.2rem; }
.figures, .charts, .examples { display: grid; gap: 1rem; margin: 0; }
.figures { grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); margin-top: 1rem; }
.examples { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); align-items: start; }
.figures > div, figure, article, details {
  background: var(--card); border: 1px solid var(--grid); border-radius: .6rem; padding: .9rem 1rem;
}
.figures dt, .figures span, figcaption p, article > p, article dt { color: var(--muted); font-size: .85rem; }
.figures dd { margin: 0; }
.figures strong {
  display: block; font-size: 1.25rem; line-height: 1.35; font-weight: 600; font-variant-numeric: tabular-nums;
}
.figures span { display: block; }
figure { display: flex; flex-direction: column; justify-content: space-between; margin: 0; min-width: 0; }
figcaption p { margin: 0; }
figcaption ul {
  display: flex; flex-wrap: wrap; gap: .1rem .9rem; margin: .25rem 0 0; padding: 0; list-style: none; font-size: .85rem;
}
figcaption i, svg { print-color-adjust: exact; }
figcaption i { display: inline-block; width: .7rem; height: .7rem; margin-right: .35rem; border-radius: .2rem; }
svg { display: block; width: 100%; height: auto; margin-top: .6rem; overflow: visible; }
svg text { font-family: inherit !important; }
h3 { margin: 0 0 .6rem; font-size: .95rem; }
.plot { position: relative; }
.cursor { position: absolute; top: 4%; bottom: 18%; width: 1px; background: var(--muted); pointer-events: none; }
.plot output {
  position: absolute; right: 0; bottom: -.3rem; padding-left: .5rem; background: var(--card);
  font-size: .85rem; font-variant-numeric: tabular-nums;
}
.wide { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; background: var(--card); font-size: .9rem; }
th, td { padding: .35rem .6rem; border: 1px solid var(--grid); text-align: left; vertical-align: top; }
td:first-child { white-space: nowrap; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--focus); outline-offset: 2px; }
th[aria-sort="ascending"] button::after { content: " ▲"; }
th[aria-sort="descending"] button::after { content: " ▼"; }
.filter { display: flex; flex-wrap: wrap; gap: .6rem 1rem; align-items: baseline; margin: 0 0 .75rem; }
.filter label { color: var(--muted); font-size: .85rem; }
input, select {
  margin-left: .5rem; padding: .3rem .45rem; border: 1px solid var(--grid); border-radius: .35rem;
  background: var(--card); color: var(--ink); font: inherit;
}
a { color: var(--focus); }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .9em; }
[hidden] { display: none !important; }
.note { margin: .75rem 0 0; color: var(--muted); font-size: .85rem; }
.right { color: var(--right); }
.wrong { color: var(--wrong); }
article { margin-bottom: .75rem; }
article > p { margin: 0 0 .4rem; overflow-wrap: anywhere; }
article dl { display: grid; grid-template-columns: 5rem 1fr; gap: .25rem .5rem; margin: 0; }
article dt { line-height: 1.6; }
article dd { margin: 0; min-width: 0; }
pre {
  margin: 0; max-height: 16rem; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .85rem/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
details { margin-top: 2rem; }
details pre { max-height: 36rem; margin-top: .75rem; }
summary { cursor: pointer; font-weight: 600; }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 2px; border-radius: .2rem; }
@media (max-width: 40rem) {
  .figures { grid-template-columns: 1fr 1fr; gap: .5rem; }
  .figures > div { padding: .6rem .7rem; }
  .figures strong { font-size: 1rem; }
}
@media print {
  body { background: none; font-size: 11px; }
  pre { max-height: none; }
  .filter, .plot output { display: none; }
  .charts { grid-template-columns: repeat(3, 1fr); gap: .5rem; }
  figure, article, .figures > div, tr { break-inside: avoid; }
}
"""
