"""The page of a run, from plain values and arrays alone.

Parts of the page that are numbers and text."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from supmim_jax import environment
from supmim_jax.config import Config
from supmim_jax.report import images
from supmim_jax.report.files import Evaluation
from supmim_jax.report.images import Measured
from supmim_jax.report.markup import (
    Markup,
    Section,
    Series,
    chart,
    contents,
    element,
    join,
    note,
    page,
    section,
    table,
)

METRICS = {
    "top1": "top-1 %",
    "knn": "kNN %",
    "psnr": "PSNR dB",
    "codes_used": "codes used %",
    "perplexity": "perplexity",
    "miou": "mIoU %",
    "pixel_accuracy": "pixel accuracy %",
}
CHARTS = {  # by title; what metrics.jsonl has besides gets a chart of its own
    "Loss and its terms": (
        "loss",
        *("ce", "mim"),
        *("reconstruction", "position", "contrastive"),
        *("l1", "l2", "codebook", "commitment", "entropy", "perceptual", "generator"),
    ),
    "Accuracy on training batches, share": (
        *("accuracy", "mim_accuracy"),
        *("position_accuracy", "contrastive_accuracy"),
    ),
    "Learning rate": ("learning_rate",),
    "Images per second": ("images_per_second",),
    "Share of time waiting for data": ("data_wait",),
    "Discriminator": ("discriminator", "r1"),
}
DOTTED = "eval/"


def title_of(metric: str) -> str:
    return METRICS.get(metric, metric)


def number(value: float) -> Markup:
    """Two decimals to read, and the number as it was written for whoever takes it from here."""
    return element("data", f"{value:.2f}", value=repr(value))


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def sections_header(
    name: str, cfg: Config, step: int, run: dict, split: str, found: Sequence[Evaluation]
) -> Markup:
    """What was trained, on what, for how long, and its first numbers."""
    headline = found[0].metrics if found else {}
    source = f"{found[0].source} ({found[0].about})" if found else "nothing was measured yet"
    if found and step != cfg.total_steps:
        source += f"; the images, however, are of step {step}"
    tiles = [(title_of(metric), number(x), "headline") for metric, x in list(headline.items())[:4]]
    data = cfg.data
    epochs = run["position"] / data.train_examples
    facts = (
        ("objective", objective(cfg)),
        ("data", f"{data.name}, {data.train_examples} images, {data.num_classes} classes"),
        ("images from split", split),
        ("step", f"{step} of {cfg.total_steps}"),
        ("epochs", f"{epochs:.4g} of {cfg.epochs:g}"),
        ("training", duration(run["seconds"])),
    )
    boxes = [
        element("div", element("dt", term), element("dd", value), class_=kind)
        for term, value, kind in (*tiles, *((*fact, "fact") for fact in facts))
    ]
    return element(
        "header",
        element("h1", name),
        element("p", f"Headline numbers: {source}.", class_="note"),
        element("dl", *boxes, class_="facts"),
    )


def objective(cfg: Config) -> str:
    if not cfg.objective.plain_target:
        return cfg.objective.name
    return f"{cfg.objective.name}, target {cfg.objective.target.name}"


def curves(found: dict[str, list[tuple[int, float]]], step: int) -> Section:
    """A chart per group of metrics.jsonl; a value that is always 0 is a term that is off."""
    alive = {name: points for name, points in found.items() if any(y for _, y in points)}
    evals = [name for name in alive if name.startswith(DOTTED)]
    grouped = {name for names in CHARTS.values() for name in names} | set(evals)
    charts = [*CHARTS.items(), *((name, (name,)) for name in alive if name not in grouped)]
    drawn = [
        chart(title, [Series(name, alive[name]) for name in names if name in alive], step)
        for title, names in charts
        if any(name in alive for name in names)
    ]
    if evals:
        dots = [Series(title_of(x.removeprefix(DOTTED)), alive[x], dots=True) for x in evals]
        drawn.insert(0, chart("Evaluations during training", dots, step))
    if not drawn:
        return section("Curves", "curves", note("The run has no metrics.jsonl."))
    text = "From metrics.jsonl. The dotted upright line is the step of this checkpoint."
    return section("Curves", "curves", note(text), element("div", *drawn, class_="charts"))


def evaluations(found: Sequence[Evaluation]) -> Section:
    """Every number that was measured, a row each."""
    rows = [
        (title_of(metric), number(value), one.source, one.about)
        for one in found
        for metric, value in one.metrics.items()
    ]
    if not rows:
        text = "Neither results.json nor evals/*.json is there: nothing was measured yet."
        return section("Evaluations", "evaluations", note(text))
    head = ("measure", "value", "file", "of")
    return section("Evaluations", "evaluations", table("Everything that was measured.", head, rows))


def config(cfg: Config) -> Section:
    """The config in tables by section, and what follows from it."""
    tables = [
        table(path, HEAD, rows, class_="values") for path, rows in grouped(cfg, Config(), "config")
    ]
    derived = {
        "total_steps": cfg.total_steps,
        "warmup_steps": cfg.warmup_steps,
        "peak_lr": cfg.peak_lr,
    }
    rows = [(name, f"{value:g}", "") for name, value in derived.items()]
    tables.append(table("derived from these", HEAD, rows, class_="values"))
    text = "Marked values differ from the defaults of the schema, which stand beside them."
    return section("Config", "config", note(text), element("div", *tables, class_="sections"))


HEAD = ("key", "value", "default")


def grouped(values: Any, default: Any, path: str) -> list[tuple[str, list[tuple[str, ...]]]]:
    """(path, rows) of a section and those in it; `default` may be of another kind of section.

    Then the values are compared with the defaults of their own kind, and its `name` with the
    default's.
    """
    own = default if type(default) is type(values) else type(values)()
    rows, inner = [], []
    for name, value in vars(values).items():
        if dataclasses.is_dataclass(value):
            inner += grouped(value, vars(own)[name], f"{path}.{name}")
        else:
            usual = vars(default if name == "name" else own)[name]
            rows.append(row(name, value, usual))
    return [(path, rows), *inner] if rows else inner


def row(name: str, value: Any, usual: Any) -> tuple[str, ...]:
    """A value and its default, marked and with the default beside it where they differ."""
    if value == usual:
        return name, text_of(value), ""
    return name, element("mark", text_of(value)), text_of(usual)


def text_of(value: Any) -> str:
    return value if isinstance(value, str) and value else repr(value)


def environments(parts: Sequence[dict], here: dict) -> Section:
    """What it was trained on, and what this page was made on, side by side where they differ."""
    columns = {f"training, from step {part[environment.FROM_STEP]}": part for part in parts}
    if len(columns) != 1 or not environment.same(parts[0], here):
        columns["this report"] = here
    names = [name for name in here if name != environment.FROM_STEP]
    rows = [(name, *(cell(name, column, columns) for column in columns.values())) for name in names]
    told = "" if parts else "The run did not note what it was trained on. "
    text = f"{told}The report was made at {here[environment.DATE]}."
    return section(
        "Environment",
        "environment",
        note(text),
        table("Versions and hardware.", ("", *columns), rows, class_="values"),
    )


def cell(name: str, column: dict, columns: dict[str, dict]) -> Markup:
    """A value of the environment, marked where the columns do not agree."""
    text = str(column.get(name, "")) or "unknown"
    differs = len({str(other.get(name, "")) for other in columns.values()}) > 1
    return element("mark", text) if differs and name != environment.DATE else join(text)


@dataclass(frozen=True)
class Report:
    """All that the page shows."""

    name: str
    cfg: Config
    step: int
    run: dict  # position and seconds, as the checkpoint has them
    split: str
    curves: dict[str, list[tuple[int, float]]]
    evaluations: list[Evaluation]
    trained_on: list[dict]
    made_on: dict
    measured: Measured


def render(report: Report) -> str:
    """The HTML document."""
    found = [
        curves(report.curves, report.step),
        evaluations(report.evaluations),
        *_views(report.measured),
        config(report.cfg),
        environments(report.trained_on, report.made_on),
    ]
    header = sections_header(
        report.name, report.cfg, report.step, report.run, report.split, report.evaluations
    )
    parts = (one.content for one in found)
    return page(f"{report.name}: report", header, contents(found), *parts)


def _views(measured: Measured) -> list[Section]:
    """Those for which there are arrays."""
    examples, classes, found = measured.examples, measured.classes, []
    if measured.neighbours:
        found.append(images.neighbours(examples, measured.neighbours, classes))
    if measured.panels:
        found.append(images.predictions(examples, measured.panels, classes))
    if measured.tokens is not None:
        found.append(images.views_components(examples, measured.tokens, classes))
    if measured.segmented:
        found.append(images.segmentation(measured.segmented))
    return found
