"""How a report looks: its style sheet, for screens of any width and for paper."""

STYLE = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue",
       "Noto Sans", "Liberation Sans", Arial, sans-serif; margin: 0 auto; max-width: 66rem;
       padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 0 0 .8rem; }
header p { color: var(--quiet); margin: .4rem 0 0; overflow-wrap: anywhere; }
a { color: var(--link); text-underline-offset: .15em; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; border-radius: 3px; }
nav { margin: 1.2rem 0 0; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; margin: 0; padding: 0; font-size: .9rem; }
nav a { display: inline-block; padding: .2rem 0; }
section { margin-top: 2.2rem; padding-top: 1.4rem; border-top: 1px solid var(--line); }
.paragraph { margin: 0 0 .8rem; max-width: 42rem; overflow-wrap: anywhere; }
.paragraph.bad, .paragraph.warning, .paragraph.good { max-width: none; padding: .6rem .9rem; border-radius: 4px;
       border-left: 4px solid; }
.paragraph.bad { background: var(--bad-ground); border-color: var(--bad); }
.paragraph.warning { background: var(--warning-ground); border-color: var(--warning); }
.paragraph.good { background: var(--good-ground); border-color: var(--good); }
.source { color: var(--quiet); font-size: .8rem; line-height: 1.4; margin: .3rem 0 0; overflow-wrap: anywhere; }
.caption { font-weight: 600; font-size: .95rem; line-height: 1.4; margin: 0 0 .4rem; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: .8rem;
       margin: 0 0 1.2rem; }
.numbers div { background: var(--raised); border-radius: 6px; padding: .8rem 1rem; min-width: 0; }
.numbers dt { font-size: .9rem; font-weight: 600; }
.numbers dd { margin: 0; font-size: .9rem; line-height: 1.45; overflow-wrap: anywhere; }
.numbers dd.value { font-size: 1.5rem; line-height: 1.3; font-weight: 600; font-variant-numeric: tabular-nums;
       letter-spacing: -.01em; margin: .1rem 0 .2rem; }
.numbers dd.source { font-size: .8rem; margin-top: .3rem; }
.table, .text { margin: 0 0 1.5rem; }
.scroll { overflow-x: auto; }
tbody tr:last-child > * { border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; font-size: .9rem; line-height: 1.4; font-variant-numeric: tabular-nums;
       min-width: min(100%, 24rem); }
th, td { padding: .32rem 1rem .32rem 0; text-align: left; vertical-align: top; border-top: 1px solid var(--line);
       max-width: 26rem; overflow-wrap: break-word; }
th:last-child, td:last-child { padding-right: .4rem; }
thead th { border-top: 0; color: var(--quiet); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 400; }
.number { text-align: right; white-space: nowrap; }
.short { white-space: nowrap; }
.many .long { min-width: 10rem; }
.many .longer { min-width: 15rem; }
.few td { overflow-wrap: anywhere; max-width: 34rem; }
tr.bad > *, tr.warning > *, tr.good > * { background: var(--ground); }
tr.bad > :first-child, tr.warning > :first-child, tr.good > :first-child { box-shadow: inset 4px 0 var(--edge); }
.marked tr > :first-child { padding-left: .8rem; }
tr.bad { --ground: var(--bad-ground); --edge: var(--bad); }
tr.warning { --ground: var(--warning-ground); --edge: var(--warning); }
tr.good { --ground: transparent; --edge: var(--good); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1.6rem 2rem;
       margin: 0 0 1.6rem; }
figure { margin: 0; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figcaption { font-weight: 600; font-size: .95rem; line-height: 1.4; margin-bottom: .4rem; }
svg { display: block; width: 100%; height: auto; max-width: calc(var(--width) * 1.3); }
svg image { image-rendering: pixelated; }
figure.wide svg:first-of-type { display: none; }
@media screen and (max-width: 42rem) {
  body { padding: 1.2rem .9rem 3rem; }
  h1 { font-size: 1.4rem; }
  figure.wide svg:first-of-type { display: block; }
  figure.wide svg:last-of-type { display: none; }
}
pre { background: var(--raised); border-radius: 6px; padding: .8rem 1rem; margin: 0; white-space: pre-wrap;
       overflow-wrap: anywhere; max-height: 26rem; overflow-y: auto; unicode-bidi: plaintext;
       font: .85rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
nav summary { font-size: .9rem; color: var(--link); }
summary { cursor: pointer; }
summary h2 { display: inline; }
details[open] > summary { margin-bottom: .8rem; }
@media print {
  @page { margin: 16mm 14mm; }
  :root { --paper: #ffffff; }
  body { max-width: none; padding: 0; font-size: 10.5pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  nav { display: none; }
  section { margin-top: 1.2rem; padding-top: .8rem; }
  h2, .caption, figcaption, summary { break-after: avoid; }
  figure, .numbers div, tr, .paragraph { break-inside: avoid; }
  thead { display: table-header-group; }
  .scroll { overflow: visible; }
  table { font-size: 8.5pt; }
  pre { max-height: none; }
  .charts { grid-template-columns: 1fr 1fr; gap: 1rem 1.6rem; }
  svg { max-width: var(--width); }
  .numbers { grid-template-columns: repeat(3, 1fr); }
  .numbers dd.value { font-size: 1.4rem; }
  details::details-content { content-visibility: visible; height: auto; block-size: auto; }
}
"""
