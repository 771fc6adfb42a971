"""HTML as plain text: whatever is not made by `element` is escaped on its way into a page.

The page's one style sheet: system fonts, light and dark, screen, phone and paper.

Curves as inline SVG, coloured by the page's style sheet."""

import base64
import hashlib
import html
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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

BARRED = ("Cc", "Cs")  # categories of Unicode
VOID = ("img", "link", "meta", "col", "br")


class Markup(str):
    """Text that is HTML already. Adding or formatting it gives a plain string, escaped again."""

    __slots__ = ()


def element(tag: str, /, *children: str, **attributes: str | int) -> Markup:
    """An element; children are escaped unless they are Markup, attributes always are.

    Underscores in names of attributes become hyphens, and class_ is class.
    """
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(str(value))}"'
        for key, value in attributes.items()
    )
    if tag in VOID:
        return Markup(f"<{tag}{pairs}>")
    return Markup(f"<{tag}{pairs}>{join(*children)}</{tag}>")


def escaped(text: str) -> str:
    """Text without a meaning in HTML; controls and half characters, which it lacks, as �."""
    kept = (c if c in "\t\n" or unicodedata.category(c) not in BARRED else "�" for c in text)
    return html.escape("".join(kept))


def join(*children: str) -> Markup:
    """Children one after the other, escaped unless they are Markup."""
    return Markup("".join(x if isinstance(x, Markup) else escaped(x) for x in children))


class Section(NamedTuple):
    """A part of the page that its contents list leads to."""

    title: str
    anchor: str
    content: Markup


def section(title: str, anchor: str, *children: str) -> Section:
    heading = element("h2", title, id=f"{anchor}-title")
    content = element("section", heading, *children, id=anchor, aria_labelledby=f"{anchor}-title")
    return Section(title, anchor, content)


def contents(sections: Sequence[Section]) -> Markup:
    """Links to the sections."""
    links = (element("a", one.title, href=f"#{one.anchor}") for one in sections)
    entries = element("ul", *(element("li", link) for link in links))
    return element("nav", entries, aria_label="Sections")


def note(text: str) -> Markup:
    return element("p", text, class_="note")


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], **attributes) -> Markup:
    """A table whose first column names its rows; it scrolls by itself where it is too wide."""
    top = element("thead", element("tr", *(element("th", x, scope="col") for x in head)))
    body = element(
        "tbody",
        *(
            element("tr", element("th", row[0], scope="row"), *(element("td", x) for x in row[1:]))
            for row in rows
        ),
    )
    inner = element("table", element("caption", caption), top, body, **attributes)
    return element("div", inner, class_="scroll", role="region", aria_label=caption, tabindex=0)


def page(title: str, *children: str) -> str:
    """The whole document. Its policy allows this one style sheet and images inside the page."""
    digest = base64.b64encode(hashlib.sha256(CSS.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Markup(CSS)),
    )
    body = element("body", element("main", *children))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


WIDTH, HEIGHT = 360, 190  # of the drawing; text has 11 units and so stays readable on a phone
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 24  # margins
MOST_POINTS = 300  # of a curve
STYLES = 8  # colours and dashes in the style sheet


@dataclass(frozen=True)
class Series:
    """A curve; `dots` draws its points too, for values that are few and far between."""

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = False

    @property
    def last(self) -> float:
        return self.points[-1][1]


def chart(title: str, series: Sequence[Series], here: int | None = None) -> Markup:
    """A figure with steps below and a legend with the last values; `here` marks a step."""
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    x_top, y_ticks = max(xs), ticks(min(ys), max(ys))
    x_ticks = [x for x in ticks(0, x_top) if x <= x_top]
    low, high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        right = LEFT + (WIDTH - LEFT - RIGHT) * x / max(x_top, 1e-12)
        down = TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / max(high - low, 1e-12)
        return round(right, 1), round(down, 1)

    parts = []
    for y in y_ticks:
        left, level = place(0, y)
        parts += [
            element("line", x1=left, x2=WIDTH - RIGHT, y1=level, y2=level, class_="grid"),
            element("text", f"{y:g}", x=left - 6, y=level + 4, text_anchor="end"),
        ]
    for x in x_ticks:
        text = f"step {x:g}" if x == x_ticks[-1] else f"{x:g}"
        anchor = "end" if x == x_ticks[-1] else "middle"
        parts.append(element("text", text, x=place(x, 0)[0], y=HEIGHT - 6, text_anchor=anchor))
    if here is not None:
        x = place(here, 0)[0]
        parts.append(element("line", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM, class_="here"))
    for i, one in enumerate(series):
        parts.append(_curve(one, i % STYLES, place))
    summary = "; ".join(f"{x.name}: {x.points[0][1]:.4g} to {x.last:.4g}" for x in series)
    drawing = element(
        "svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{title}. {summary}"
    )
    return element("figure", element("h3", title), drawing, _legend(series))


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that span [low, high], about `count` steps apart; one value is enough."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * x for x in (1, 2, 5, 10) if power * x >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def _curve(series: Series, style: int, place) -> Markup:
    points = thinned(series.points)
    path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in points))
    drawn = [element("polyline", points=path, class_=f"line l{style}")]
    if series.dots or len(points) == 1:
        for point in points:
            x, y = place(*point)
            label = element("title", f"{series.name}, step {point[0]:g}: {point[1]:.4g}")
            drawn.append(element("circle", label, cx=x, cy=y, r=3, class_=f"dot d{style}"))
    return join(*drawn)


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points, evenly taken, the last one among them."""
    every = -(-len(points) // MOST_POINTS)
    return list(points[::-1][::every][::-1])


def _legend(series: Sequence[Series]) -> Markup:
    entries = []
    for i, one in enumerate(series):
        line = element("line", x1=0, x2=36, y1=6, y2=6, class_=f"line l{i % STYLES}")
        swatch = element("svg", line, viewBox="0 0 36 12", aria_hidden="true")
        entries.append(element("li", swatch, f"{one.name} {one.last:.4g}"))
    return element("figcaption", element("ul", *entries, class_="legend"))
