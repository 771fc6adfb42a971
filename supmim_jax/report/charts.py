"""Curves as inline SVG, coloured by the page's style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from supmim_jax.report.markup import Markup, element, join

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
