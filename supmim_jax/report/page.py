"""The page of a run, from plain values and arrays alone."""

from dataclasses import dataclass

from supmim_jax.config import Config
from supmim_jax.report import sections, views
from supmim_jax.report.files import Evaluation
from supmim_jax.report.markup import Section, contents, page
from supmim_jax.report.measured import Measured


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
        sections.curves(report.curves, report.step),
        sections.evaluations(report.evaluations),
        *_views(report.measured),
        sections.config(report.cfg),
        sections.environments(report.trained_on, report.made_on),
    ]
    header = sections.header(
        report.name, report.cfg, report.step, report.run, report.split, report.evaluations
    )
    parts = (one.content for one in found)
    return page(f"{report.name}: report", header, contents(found), *parts)


def _views(measured: Measured) -> list[Section]:
    """Those for which there are arrays."""
    examples, classes, found = measured.examples, measured.classes, []
    if measured.neighbours:
        found.append(views.neighbours(examples, measured.neighbours, classes))
    if measured.panels:
        found.append(views.predictions(examples, measured.panels, classes))
    if measured.tokens is not None:
        found.append(views.components(examples, measured.tokens, classes))
    if measured.segmented:
        found.append(views.segmentation(measured.segmented))
    return found
