"""The page's one style sheet: system fonts, light and dark, screen, phone and paper."""

CSS = """
:root {
  --paper: #ffffff; --panel: #f6f7f9; --line: #d9dde3; --text: #1d2330; --soft: #5b6474;
  --right: #0072b2; --wrong: #d55e00; --marked: #fff3d1;
  --c0: #0072b2; --c1: #d55e00; --c2: #00805f; --c3: #a3527e; --c4: #8a6d00; --c5: #4a4f5a;
  --c6: #1b8fbf; --c7: #7a4fd0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171d; --panel: #1d222b; --line: #343b48; --text: #e8eaee; --soft: #a3acbb;
    --right: #56b4e9; --wrong: #ff9247; --marked: #4a3b10;
    --c0: #56b4e9; --c1: #ff9247; --c2: #2fc79c; --c3: #e391be; --c4: #e6c229; --c5: #c3c8d2;
    --c6: #8fd3f4; --c7: #b79cf5;
  }
}
* { box-sizing: border-box; }
html { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--text); }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem; padding-top: .6rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { margin: .3rem 0 .8rem; max-width: 46rem; overflow-wrap: anywhere; }
.note, caption, figcaption { color: var(--soft); font-size: .875rem; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; padding: 0;
  margin: 1rem 0 0; font-size: .9rem; }
a { color: var(--right); text-underline-offset: .15em; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .6rem;
  margin: 1.1rem 0 0; }
.facts div { background: var(--panel); border-radius: 6px; padding: .6rem .8rem; }
.facts dt { color: var(--soft); font-size: .8rem; }
.facts dd { margin: 0; font-size: 1rem; overflow-wrap: anywhere; }
.facts .headline dd { font-size: 1.6rem; line-height: 1.25; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr));
  gap: 1.2rem; }
figure { margin: 0; break-inside: avoid; }
figure > h3 { margin: 0 0 .2rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 11px; fill: var(--soft); }
.grid { stroke: var(--line); stroke-width: 1; }
.here { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 1 4; }
.line { fill: none; stroke-width: 1.7; stroke-linejoin: round; }
.dot { stroke: none; }
.l0 { stroke: var(--c0); } .d0 { fill: var(--c0); }
.l1 { stroke: var(--c1); stroke-dasharray: 6 2; } .d1 { fill: var(--c1); }
.l2 { stroke: var(--c2); stroke-dasharray: 2 2; } .d2 { fill: var(--c2); }
.l3 { stroke: var(--c3); stroke-dasharray: 8 2 2 2; } .d3 { fill: var(--c3); }
.l4 { stroke: var(--c4); stroke-dasharray: 4 4; } .d4 { fill: var(--c4); }
.l5 { stroke: var(--c5); stroke-dasharray: 10 3; } .d5 { fill: var(--c5); }
.l6 { stroke: var(--c6); stroke-dasharray: 1 2; } .d6 { fill: var(--c6); }
.l7 { stroke: var(--c7); stroke-dasharray: 7 3 1 3; } .d7 { fill: var(--c7); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0 .9rem; padding: 0;
  margin: .2rem 0 0; }
.legend svg { display: inline-block; width: 1.8rem; height: .7rem; margin-right: .35rem; }
.scroll { overflow-x: auto; margin: .6rem 0 1.2rem; }
.scroll:focus-visible { outline: 2px solid var(--right); }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { text-align: left; vertical-align: top; padding: .28rem .9rem .28rem 0;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 500; }
.values { width: 100%; table-layout: fixed; }
.values th, .values td { overflow-wrap: anywhere; }
mark { background: var(--marked); color: inherit; font-weight: 600; border-radius: 3px;
  padding: 0 .25rem; margin-left: -.25rem; }
.values caption { color: var(--text); font-weight: 600; font-size: 1rem; }
.sections { columns: 24rem; column-gap: 2.2rem; }
.sections .scroll { break-inside: avoid; margin-top: 0; }
img { display: block; width: 100%; height: auto; border-radius: 2px; }
.small { image-rendering: pixelated; }
.neighbours { width: 100%; max-width: 50rem; table-layout: fixed; }
.neighbours th, .neighbours td { padding: .3rem; border: 0; font-size: .75rem; line-height: 1.3;
  overflow-wrap: anywhere; }
.neighbours tbody th { font-weight: 600; }
.frame { border: 3px solid; border-radius: 4px; padding: 1px; margin-bottom: .15rem; }
.same { border-color: var(--right); }
.other { border-color: var(--wrong); border-style: dashed; }
.query { border-color: transparent; }
.soft { display: block; color: var(--soft); }
.tick { color: var(--right); font-weight: 700; }
.cross { color: var(--wrong); font-weight: 700; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr));
  gap: 1.1rem; }
.strip { display: flex; gap: .4rem; }
.strip div { flex: 1 1 0; min-width: 0; max-width: 8rem; font-size: .75rem; color: var(--soft); }
@media (max-width: 30rem) {
  main { padding: 1rem .8rem 3rem; }
  .neighbours th, .neighbours td { padding: .15rem; font-size: .68rem; }
  .frame { border-width: 2px; }
  .values { font-size: .8rem; }
  .values th:first-child { width: 36%; }
}
@media print {
  :root { --paper: #fff; --panel: #fff; --text: #000; --soft: #444; --line: #bbb;
    --right: #0072b2; --wrong: #d55e00; --marked: #eee; --c0: #0072b2; --c1: #d55e00;
    --c2: #00805f; --c3: #a3527e; --c4: #8a6d00; --c5: #4a4f5a; --c6: #1b8fbf; --c7: #7a4fd0; }
  html { font-size: 11px; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  h2 { break-after: avoid; }
  tr, .facts div { break-inside: avoid; }
  .facts div { border: 1px solid var(--line); }
  .scroll { overflow: visible; }
}
"""
