"""The README.md of an export: a model card in the form that the Hugging Face hub reads.

Its text is model_card.md, filled in by jinja2.
"""

import json
import re
from collections.abc import Sequence
from importlib import resources
from typing import NamedTuple

import jinja2

from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config.configdict import to_configdict
from supmim_jax.report.measure import curves, evaluations
from supmim_jax.report.page import METRICS

# The hub's names of a metric's task and kind; all other metrics are of features.
TASKS = {
    "top1": ("image-classification", "accuracy"),
    "miou": ("image-segmentation", "mean_iou"),
    "pixel_accuracy": ("image-segmentation", "accuracy"),
}
FEATURES = "image-feature-extraction"
PROGRAMS = {"onnx": "onnx", "stablehlo": "jax"}  # and the libraries that run them


class Metric(NamedTuple):
    name: str
    value: float
    where: str  # it was measured

    @property
    def title(self) -> str:
        return METRICS.get(self.name, self.name)

    def for_hub(self) -> dict:
        task, kind = TASKS.get(self.name, (FEATURES, self.name))
        dataset = {"name": self.where, "type": self.where}
        metric = {"type": kind, "name": self.title, "value": round(self.value, 4)}
        return {"task": {"type": task}, "dataset": dataset, "metrics": [metric]}


def write(checkpoint: Checkpoint, to: str, loading: str, class_names: Sequence[str]) -> str:
    """The card of a checkpoint that was exported for the library `to`.

    Args:
      checkpoint: what was exported.
      to: a format of `supmim_jax.export`.
      loading: Python code that loads it, given that the export is the current directory.
      class_names: of the classifier's outputs, if they are known.

    Raises:
      SetupError: a file with the run's measurements cannot be read.
    """
    cfg, name, metrics = checkpoint.config, checkpoint.workdir.name, measured(checkpoint)
    classifier = cfg.objective.leaves == "classifier"
    front = {
        "license": "unknown",
        "library_name": PROGRAMS.get(to, to),
        "pipeline_tag": "image-classification" if classifier else FEATURES,
        "tags": ["supmim_jax", "vit", cfg.objective.name],
    }
    if metrics:  # the hub refuses an empty list of results
        front["model-index"] = [{"name": name, "results": [x.for_hub() for x in metrics]}]
    # JSON is YAML, and quotes what needs it. The licence is for the user to fill in.
    yaml = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    text = (resources.files("supmim_jax") / "model_card.md").read_text()
    card = jinja2.Template(text, trim_blocks=True, undefined=jinja2.StrictUndefined)
    return card.render(
        front=yaml.replace('"unknown"', "unknown  # fill in, such as apache-2.0", 1),
        name=name,
        step=checkpoint.step,
        cfg=cfg,
        model=cfg.model,
        data=cfg.data,
        classifier=classifier,
        pooled={"gap": "the mean over the patch tokens", "cls": "the CLS token"}[cfg.model.pooling],
        classes=list(class_names),
        metrics=metrics,
        loading=loading,
        is_program=to in PROGRAMS,
        config=json.dumps(to_configdict(cfg).to_dict(), indent=2),
    )


def measured(checkpoint: Checkpoint) -> list[Metric]:
    """All that was measured of a checkpoint's step; raises SetupError if a file of it is broken."""
    data, workdir = checkpoint.config.data, checkpoint.workdir
    found = []
    for name, points in curves(workdir).items():
        value = dict(points).get(checkpoint.step)
        if name.startswith("eval/") and value is not None:
            where = f"{data.name}, split {data.eval_split}"
            found.append(Metric(name.removeprefix("eval/"), value, where))
    for evaluation in evaluations(workdir):
        if re.search(rf"-{checkpoint.step}\.json$", evaluation.source):
            where = f"{evaluation.about} ({evaluation.source})"
            found += [Metric(name, value, where) for name, value in evaluation.metrics.items()]
    return found
