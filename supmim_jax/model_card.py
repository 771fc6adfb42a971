"""The README.md of an export: a model card in the form that the Hugging Face hub reads."""

import json
import re
from collections.abc import Sequence

from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config.configdict import to_configdict
from supmim_jax.report import files
from supmim_jax.report.page import METRICS

# The hub's names of a metric's task and kind; all other metrics are of features.
TASKS = {
    "top1": ("image-classification", "accuracy"),
    "miou": ("image-segmentation", "mean_iou"),
    "pixel_accuracy": ("image-segmentation", "accuracy"),
}
FEATURES = "image-feature-extraction"
LIBRARIES = {"onnx": "onnx", "stablehlo": "jax"}


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
    cfg = checkpoint.config
    model, data, name = cfg.model, cfg.data, checkpoint.workdir.name
    classifier = cfg.objective.leaves == "classifier"
    metrics, results = measured(checkpoint), []
    for metric, value, where in metrics:
        task, kind = TASKS.get(metric, (FEATURES, metric))
        shown = {"type": kind, "name": METRICS.get(metric, metric), "value": round(value, 4)}
        dataset = {"name": where, "type": where}
        results.append({"task": {"type": task}, "dataset": dataset, "metrics": [shown]})
    front = {
        "license": "unknown",
        "library_name": LIBRARIES.get(to, to),
        "pipeline_tag": "image-classification" if classifier else FEATURES,
        "tags": ["supmim_jax", "vit", cfg.objective.name],
    }
    if results:  # the hub refuses an empty list of results
        front["model-index"] = [{"name": name, "results": results}]
    # JSON is YAML, and quotes what needs it. The licence is for the user to fill in.
    yaml = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    yaml = yaml.replace('"unknown"', "unknown  # fill in, such as apache-2.0", 1)
    pooled = {"gap": "the mean over the patch tokens", "cls": "the CLS token"}[model.pooling]
    head = f" and a classifier of {data.num_classes} classes" if classifier else ""
    rows = [f"| {METRICS.get(x, x)} | {value:.2f} | {where} |" for x, value, where in metrics]
    table = "\n".join(["| metric | value | measured on |", "|---|---|---|", *rows])
    named = ", ".join(class_names[:10]) + (", ..." if len(class_names) > 10 else "")
    classes = f" Classes: {named}." if named else ""
    colours = {1: "grey", 3: "RGB"}[data.channels]
    scaled = " inside the program" if to in LIBRARIES else ", as the files beside this one say"
    return f"""---
{yaml}
---

# {name}

A vision transformer{head}: patches of {model.patch} px, width {model.width}, {model.depth} \
layers, {model.heads} heads. The embedding of an image is {pooled}, {model.width} numbers. \
Exported by `supmim_jax.export` from step {checkpoint.step} of `{name}`.

## Data

Trained on `{data.name}`, split `{data.train_split}`, {data.train_examples} images, with the \
objective `{cfg.objective.name}`; epochs: {cfg.epochs:g}, batch size: {cfg.batch_size}.{classes}

## Measured

{table if rows else "Nothing was measured at this step."}

## Use

In the directory of this file:

```python
{loading}
```

Images are turned as EXIF says, transparent ones put over white, the shorter side resized to \
{data.eval_resize} px ({data.resize}), and the centre of {data.image_size} x {data.image_size} px \
cut out, {colours}, 0 to 255. Values are scaled to [-1, 1]{scaled}.

## Config

```json
{json.dumps(to_configdict(cfg).to_dict(), indent=2)}
```
"""


def measured(checkpoint: Checkpoint) -> list[tuple[str, float, str]]:
    """Name, value and where it was measured, of all that was measured of a checkpoint's step.

    Raises:
      SetupError: a file of measurements is not of its form.
    """
    data, workdir = checkpoint.config.data, checkpoint.workdir
    found = []
    for name, points in files.curves(workdir).items():
        value = dict(points).get(checkpoint.step)
        if name.startswith("eval/") and value is not None:
            where = f"{data.name}, split {data.eval_split}"
            found.append((name.removeprefix("eval/"), value, where))
    for evaluation in files.evaluations(workdir):
        if re.search(rf"-{checkpoint.step}\.json$", evaluation.source):
            where = f"{evaluation.about} ({evaluation.source})"
            found += [(name, value, where) for name, value in evaluation.metrics.items()]
    return found
