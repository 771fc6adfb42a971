"""The report's page, made from plain values and arrays: template.html filled in by jinja2.

jinja2 escapes everything. Charts are matplotlib's SVG, embedded as images, so that one policy
without scripts or foreign sources covers the whole page.
"""

import base64
import dataclasses
import hashlib
import io
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import jinja2
import numpy as np

from supmim_jax import environment
from supmim_jax.config import IGNORED, Config
from supmim_jax.report.measure import GROUND, Evaluation, Measured, Segmented

METRICS = {
    "top1": "top-1 %",
    "knn": "kNN %",
    "psnr": "PSNR dB",
    "codes_used": "codes used %",
    "miou": "mIoU %",
    "pixel_accuracy": "pixel accuracy %",
}
CHARTS = {  # by title; what metrics.jsonl has besides gets a chart of its own
    "Loss and its terms": (
        *("loss", "ce", "mim", "reconstruction", "position", "contrastive"),
        *("l1", "l2", "codebook", "commitment", "entropy", "perceptual", "generator"),
    ),
    "Accuracy on training batches, share": (
        *("accuracy", "mim_accuracy", "position_accuracy", "contrastive_accuracy"),
    ),
    "Learning rate": ("learning_rate",),
    "Images per second": ("images_per_second",),
    "Share of time waiting for data": ("data_wait",),
    "Discriminator": ("discriminator", "r1"),
}
EVALUATION = "eval/"
LARGEST = 112  # pixels of a side on the page; larger images are reduced to that
SMALL = 64  # up to here pixels are shown as squares
GOLDEN = 0.61803398875  # of the hue circle: neighbouring class numbers look different
DASHES = ("-", "--", ":", "-.")  # beside colours, for those who don't see them
Curves = dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class Report:
    """All that the page shows."""

    name: str
    cfg: Config
    step: int
    run: dict  # position and seconds, as the checkpoint has them
    split: str
    curves: Curves
    evaluations: list[Evaluation]
    trained_on: list[dict]
    made_on: dict
    measured: Measured


def render(report: Report) -> str:
    """The HTML document; the same report gives the same text."""
    pages = jinja2.Environment(
        loader=jinja2.PackageLoader("supmim_jax", "report"),
        autoescape=True,
        finalize=lambda x: printable(x) if isinstance(x, str) else x,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    style, *_ = pages.loader.get_source(pages, "style.css")
    derived = [
        (name, f"{getattr(report.cfg, name):g}", None)
        for name in ("total_steps", "warmup_steps", "peak_lr")
    ]
    return pages.get_template("template.html").render(
        name=report.name,
        style=jinja2.utils.markupsafe.Markup(style),
        style_digest=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        evaluations=report.evaluations,
        charts=charts(report.curves, report.step),
        cards=cards(report.measured),
        neighbours=neighbours(report.measured),
        config=[*grouped(report.cfg, Config(), "config"), ("derived from these", derived)],
        environments=environments(report.trained_on, report.made_on),
        noted=bool(report.trained_on),
        made_at=report.made_on[environment.DATE],
        title_of=lambda metric: METRICS.get(metric, metric),
        **headline(report),
    )


def printable(text: str) -> Any:
    """Text without controls and half characters, which HTML lacks; markup stays markup."""
    kept = (c if c in "\t\n" or unicodedata.category(c) not in ("Cc", "Cs") else "�" for c in text)
    return type(text)("".join(kept))


def headline(report: Report) -> dict[str, Any]:
    """What was trained, on what, for how long, and its first numbers."""
    cfg, data, first = report.cfg, report.cfg.data, report.evaluations[:1]
    source = f"{first[0].source} ({first[0].about})" if first else "nothing was measured yet"
    if first and report.step != cfg.total_steps:
        source += f"; the images, however, are of step {report.step}"
    objective = cfg.objective.name
    if cfg.objective.plain_target:
        objective += f", target {cfg.objective.target.name}"
    minutes, seconds = divmod(round(report.run["seconds"]), 60)
    hours, rest = divmod(minutes, 60)
    facts = {
        "objective": objective,
        "data": f"{data.name}, {data.train_examples} images, {data.num_classes} classes",
        "images from split": report.split,
        "step": f"{report.step} of {cfg.total_steps}",
        "epochs": f"{report.run['position'] / data.train_examples:.4g} of {cfg.epochs:g}",
        "training": f"{hours} h {rest} min" if hours else f"{minutes} min {seconds} s",
    }
    tiles = list(first[0].metrics.items())[:4] if first else []
    return {"source": source, "facts": facts, "tiles": tiles}


def charts(curves: Curves, step: int) -> list[dict[str, str]]:
    """A chart per group of metrics.jsonl; a value that is always 0 is a term that is off."""
    alive = {name: points for name, points in curves.items() if any(y for _, y in points)}
    evals = tuple(name for name in alive if name.startswith(EVALUATION))
    grouped = {name for names in CHARTS.values() for name in names} | set(evals)
    groups = {"Evaluations during training": evals, **CHARTS}
    groups |= {name: (name,) for name in alive if name not in grouped}
    drawn = []
    for title, names in groups.items():
        if series := {name: alive[name] for name in names if name in alive}:
            ends = (f"{x}: {p[0][1]:.4g} to {p[-1][1]:.4g}" for x, p in series.items())
            image = chart(series, step, dots=names is evals)
            drawn.append({"title": title, "summary": "; ".join(ends), "image": image})
    return drawn


def chart(series: Curves, here: int, dots: bool) -> str:
    """Curves over steps as an SVG's data URI; a dotted upright line marks the step `here`."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "report",  # or identifiers would depend on the time
        "text.parse_math": False,
        "font.size": 8,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.2, 2.6), layout="constrained")
        axes = figure.add_subplot()
        for i, (name, points) in enumerate(series.items()):
            xs, ys = zip(*points)
            name = name.removeprefix(EVALUATION)
            label = printable(f"{METRICS.get(name, name)[:40]} {ys[-1]:.4g}")
            marker = "o" if dots or len(xs) == 1 else None
            axes.plot(xs, ys, DASHES[i % len(DASHES)], label=label, marker=marker, markersize=3)
        axes.axvline(here, color="grey", linestyle=":", linewidth=0.8)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue().encode()).decode()}"


def cards(measured: Measured) -> list[dict[str, Any]]:
    """The sections that show images side by side: predictions, patch tokens, segmentation."""
    examples, sections = measured.examples, []
    titles = [measured.classes[label] for label in examples.labels]

    def add(kind: str, rows: Mapping[str, np.ndarray], titles: Sequence[str] = titles, **more):
        figures = [
            (title, [(name, picture(images[i])) for name, images in rows.items()])
            for i, title in enumerate(titles)
        ]
        sections.append({"kind": kind, "figures": figures, **more})

    panels = measured.panels
    if panels and "masked" not in panels:
        add("reconstructions", {"image": panels["image"], "reconstruction": panels["tokens"]})
    elif panels:
        add("token predictions" if "tokens" in panels else "pixel predictions", panels)
    if measured.tokens is not None:
        colours, (height, width) = components(measured.tokens), examples.images.shape[1:3]
        # Of the size of the image, each token a rectangle.
        down = np.arange(height) * colours.shape[1] // height
        right = np.arange(width) * colours.shape[2] // width
        shown_large = colours[:, down][:, :, right]
        add("components", {"image": examples.images, "components": shown_large})
    if found := measured.segmented:
        ground = found.classes.index(GROUND) if GROUND in found.classes else None
        rows = {
            "image": found.images,
            "mask": overlaid(found.images, found.masks, ground),
            "prediction": overlaid(found.images, found.predictions, ground),
        }
        add("segmentation", rows, agreements(found, ground), head=found.head)
    return sections


def agreements(found: Segmented, ground: int | None) -> list[str]:
    """Of each image how many pixels agree, and which classes are there."""
    titles = []
    for mask, prediction in zip(found.masks, found.predictions, strict=True):
        counted = mask != IGNORED
        agree = 100 * (mask == prediction)[counted].mean() if counted.any() else 0.0
        there = np.union1d(mask[counted], prediction[counted])
        names = ", ".join(found.classes[c] for c in there if c != ground)
        titles.append(f"{agree:.0f} % of pixels agree; {names or f'{GROUND} only'}")
    return titles


def neighbours(measured: Measured) -> dict[str, Any] | None:
    """A row per query, and how many of the neighbours have their query's class."""
    if not measured.neighbours:
        return None
    classes, rows = measured.classes, []
    examples, near = measured.examples, measured.neighbours
    for i, (image, label) in enumerate(zip(*examples, strict=True)):
        found = [
            (picture(x), classes[other], other == label, f"{similarity:.2f}")
            for x, other, similarity in zip(*(values[i] for values in near), strict=True)
        ]
        rows.append((picture(image), classes[label], found))
    same = int((near.labels == examples.labels[:, None]).sum())
    return {"rows": rows, "same": same, "count": near.labels.size}


def grouped(values: Any, default: Any, path: str) -> list[tuple[str, list[tuple[str, ...]]]]:
    """(path, rows) of a section and those in it, a row being key, value and a different default.

    `default` may be of another kind of section. Then the values are compared with the defaults of
    their own kind, and its `name` with the default's.
    """
    own = default if type(default) is type(values) else type(values)()
    rows, inner = [], []
    for name, value in vars(values).items():
        if dataclasses.is_dataclass(value):
            inner += grouped(value, vars(own)[name], f"{path}.{name}")
        else:
            usual = vars(default if name == "name" else own)[name]
            rows.append((name, shown(value), shown(usual) if value != usual else None))
    return [(path, rows), *inner] if rows else inner


def shown(value: Any) -> str:
    return value if isinstance(value, str) and value else repr(value)


def environments(parts: Sequence[dict], here: dict) -> dict[str, Any]:
    """What it was trained on, and what this page was made on, side by side where they differ."""
    columns = {f"training, from step {part[environment.FROM_STEP]}": part for part in parts}
    if len(columns) != 1 or not environment.same(parts[0], here):
        columns["this report"] = here
    rows = []
    for name in here:
        if name != environment.FROM_STEP:
            cells = [str(column.get(name, "")) or "unknown" for column in columns.values()]
            differs = len(set(cells)) > 1 and name != environment.DATE
            rows.append((name, cells, differs))
    return {"columns": list(columns), "rows": rows}


def picture(pixels_uint8: np.ndarray) -> dict[str, Any]:
    """An HxWx1 or HxWx3 image as a data URI, and whether its pixels are shown as squares."""
    height, width = pixels_uint8.shape[:2]
    factor = LARGEST / max(height, width)
    if factor < 1:
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        pixels_uint8 = cv2.resize(pixels_uint8, size, interpolation=cv2.INTER_AREA)
    colours = pixels_uint8[..., ::-1] if pixels_uint8.ndim == 3 else pixels_uint8
    _, encoded = cv2.imencode(".png", np.ascontiguousarray(colours))
    uri = f"data:image/png;base64,{base64.b64encode(encoded.tobytes()).decode()}"
    return {"uri": uri, "small": max(height, width) <= SMALL}


def components(tokens_BxHxWxD: np.ndarray) -> np.ndarray:
    """The first three principal components over all tokens as colours, uint8 BxHxWx3.

    The sign of a component is that which makes its largest loading positive, and each spans the
    range of its colour, so that the same tokens always give the same colours. Components that
    the tokens don't have are 0.
    """
    *grid, width = tokens_BxHxWxD.shape
    rows_NxD = tokens_BxHxWxD.reshape(-1, width).astype(np.float64)
    rows_NxD = rows_NxD - rows_NxD.mean(axis=0)
    scale = np.abs(rows_NxD).max()
    _, spread, loadings = np.linalg.svd(rows_NxD, full_matrices=False)
    loadings = loadings[:3][spread[:3] > 1e-9 * max(scale, 1e-30)]
    largest = np.abs(loadings).argmax(axis=1)
    loadings = loadings * np.sign(loadings[np.arange(len(loadings)), largest])[:, None]
    values_NxK = rows_NxD @ loadings.T
    values_NxK = (values_NxK - values_NxK.min(axis=0)) / np.ptp(values_NxK, axis=0)
    colours = np.zeros((len(rows_NxD), 3))
    colours[:, : values_NxK.shape[1]] = values_NxK
    return np.round(255 * colours).astype(np.uint8).reshape(*grid, 3)


def overlaid(
    images_uint8: np.ndarray, masks_BxHxW: np.ndarray, ground: int | None = None
) -> np.ndarray:
    """Images in the colours of their masks' classes; the ground and IGNORED stay clear."""
    grey = images_uint8.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
    hue = (masks_BxHxW * GOLDEN % 1.0)[..., None]
    wheel = np.abs((hue + np.array([0.0, 2 / 3, 1 / 3])) % 1.0 * 6 - 3) - 1
    tinted = 0.4 * grey + 0.6 * np.round(255 * np.clip(wheel, 0, 1))
    hidden = (masks_BxHxW == ground) | (masks_BxHxW == IGNORED)
    return np.where(hidden[..., None], grey, tinted).round().astype(np.uint8)
