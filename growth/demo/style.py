"""The page's style: light and dark as the reader's system is, from a phone to a wide screen."""

# Ink, quiet ink, paper, a raised surface, hairlines, what was met, what was not; then the curves' colours.
LIGHT = {
    "ink": "#1c1e21",
    "quiet": "#5a6069",
    "paper": "#fcfcfb",
    "raised": "#f2f3f1",
    "hair": "#d9dbd8",
    "met": "#0b6e4a",
    "missed": "#a8361a",
    "c1": "#1a5fb4",
    "c2": "#b3430c",
    "c3": "#0b7350",
    "c4": "#86379b",
    "c5": "#7d5f00",
}
DARK = {
    "ink": "#e7e8ea",
    "quiet": "#a2a8b1",
    "paper": "#15171a",
    "raised": "#1e2125",
    "hair": "#34383e",
    "met": "#57cf9f",
    "missed": "#ff9b7d",
    "c1": "#7ab4ff",
    "c2": "#ff9f68",
    "c3": "#4fcb9c",
    "c4": "#dc9ee9",
    "c5": "#e0b93f",
}
COLOURS = 5

RULES = """
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100% }
body { margin: 0; background: var(--paper); color: var(--ink);
       font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1, h2, h3 { line-height: 1.25; font-weight: 650; text-wrap: balance; overflow-wrap: anywhere; margin: 0 }
h1 { font-size: 1.85rem; letter-spacing: -.015em; max-width: 24em }
h2 { font-size: 1.35rem; letter-spacing: -.01em; margin-top: 3.5rem; padding-top: 1.25rem;
     border-top: 1px solid var(--hair) }
h3 { font-size: 1.08rem; margin: 2.2rem 0 .8rem; max-width: 40em }
p, .notes { max-width: 68ch; margin: .7rem 0; overflow-wrap: anywhere }
.quiet, figcaption, .notes { color: var(--quiet); font-size: .9rem }
.notes { padding-left: 1.1rem } .notes li { margin: .25rem 0 }
.scroll { overflow-x: auto; margin: 1rem 0; border-bottom: 1px solid var(--hair) }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--c1); outline-offset: 2px }
.scroll table { min-width: 100% }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums lining-nums }
caption { text-align: left; color: var(--quiet); padding-bottom: .4rem }
th, td { padding: .38rem .9rem .38rem 0; text-align: right; vertical-align: baseline; white-space: nowrap }
th:last-child, td:last-child { padding-right: .2rem }
th { font-weight: 550 }
thead th { color: var(--quiet); border-bottom: 1px solid var(--ink); white-space: normal;
           vertical-align: bottom }
tbody th { text-align: left } thead th:first-child { text-align: left }
tbody tr + tr > * { border-top: 1px solid var(--hair) }
td small, th small { display: block; color: var(--quiet); font-weight: 400; font-size: .8rem }
.met { color: var(--met) } .missed { color: var(--missed) }
.goals { width: 100%; margin-top: .8rem } .goals tbody th { font-weight: 400 }
.goals td, .goals th { white-space: normal; text-align: left; overflow-wrap: anywhere }
.goals td.verdict { white-space: nowrap; font-weight: 600 }
.pair { display: grid; gap: 1rem 2.5rem; align-items: start;
        grid-template-columns: minmax(0, 29rem) minmax(0, 1fr) }
.grid { display: grid; gap: 1.5rem 2rem; margin-top: 1rem;
        grid-template-columns: repeat(auto-fill, minmax(min(18.5rem, 100%), 1fr)) }
figure { margin: 0; min-width: 0 } figcaption { margin-top: .2rem }
.grid figcaption b { color: var(--ink); font-weight: 600 }
.bars { width: 100%; table-layout: fixed }
.bars th { width: 9.5rem; white-space: normal; overflow-wrap: anywhere; font-weight: 500 }
.bars td { white-space: normal; padding-right: 0 }
.bars td.amount { width: 7.6rem; text-align: left; padding-left: .8rem }
.bars tr > * { border: 0 !important; padding-top: .28rem; padding-bottom: .28rem; vertical-align: middle }
.bar { position: relative; display: block; height: .85rem; background: var(--raised) }
.bar i { position: absolute; inset: 0 auto 0 0; background: currentColor; opacity: .85 }
.bar u { position: absolute; top: 50%; height: 2px; margin-top: -1px; background: var(--ink) }
.bar s { position: absolute; top: -.2rem; bottom: -.2rem; width: 0; border-left: 1px dashed var(--ink) }
.key { display: inline-block; width: .65rem; height: .65rem; margin-right: .5rem; background: currentColor }
svg.chart { display: block; width: 100%; height: auto; font-size: 11px; font-variant-numeric: tabular-nums }
svg text { fill: var(--quiet) } svg .end { text-anchor: end } svg .middle { text-anchor: middle }
svg path { fill: none; stroke-linejoin: round }
svg .rule { stroke: var(--hair) } svg .axis { stroke: var(--quiet) }
svg .line { stroke: currentColor; stroke-width: 1.8 } svg .line.thin { stroke-width: 1.1 }
svg .line.dashed { stroke-dasharray: 5 3.5; stroke-width: 1.4 }
svg .band { fill: currentColor; opacity: .16 } svg .source { stroke: var(--quiet); stroke-dasharray: 1.5 3 }
svg .saved { stroke: var(--ink); stroke-width: 1.2 }
svg .arrived { fill: var(--paper); stroke: var(--ink); stroke-width: 1.4 }
.c0 { color: var(--quiet) }
details { margin: 1.1rem 0 }
summary { cursor: pointer; color: var(--c1); font-size: .95rem; width: fit-content }
pre { background: var(--raised); padding: .7rem .9rem; margin: .2rem 0 1.1rem; font-size: .82rem;
      line-height: 1.45;      white-space: pre-wrap; overflow-wrap: anywhere; max-width: 80ch }
@media (max-width: 46rem) {
  main { padding: 1.5rem 1rem 3rem } h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.6rem }
  .pair { grid-template-columns: minmax(0, 1fr) }
  .bars th { width: 7.4rem } .bars td.amount { width: 6.4rem; padding-left: .6rem }
  .scroll th:first-child { position: sticky; left: 0; background: var(--paper); white-space: normal;
                           min-width: 6.5rem; max-width: 9rem; overflow-wrap: anywhere }
  .goals thead { display: none }
  .goals tbody tr { display: grid; grid-template-columns: 1fr auto; column-gap: 1rem; padding: .6rem 0;
                    border-top: 1px solid var(--hair) }
  .goals tr > * { border: 0 !important; padding: .05rem 0 }
  .goals td.verdict { grid-area: 1 / 2 }
}
@media print { details > * { display: block } main { max-width: none } }
"""


def style() -> str:
    colours = "\n".join(f".c{i} {{ color: var(--c{i}) }}" for i in range(1, COLOURS + 1))
    dark = f"@media (prefers-color-scheme: dark) {{ {_root(DARK)} }}"
    return f":root {{ color-scheme: light dark }}\n{_root(LIGHT)}\n{dark}\n{RULES}{colours}\n"


def _root(colours: dict[str, str]) -> str:
    return ":root { " + "; ".join(f"--{name}: {colour}" for name, colour in colours.items()) + " }"
