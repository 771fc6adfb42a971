"""Writes an encoder, and its classifier if it has one, for another library.

python -m supmim_jax.export --checkpoint runs/supmim --to transformers --out exported

For timm and transformers the result is a directory with model.safetensors and config.json as they
load them. For onnx and stablehlo it is one program with the weights inside, model.onnx or
model.stablehlo, which takes images, uint8 BxHxWxC as config.json says that they are prepared, B
free, and gives in float32 `embedding` BxD, `tokens` BxhxwxD on the grid of patches and, with a
classifier, `logits` BxV. A model card, README.md, says what it is and how it is loaded. What is
written computes the same from the same pixels, in float32.
"""

import json
import os
import re
import warnings
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export  # not imported by jax itself
import jax.numpy as jnp
import jinja2
import numpy as np
from absl import flags

from supmim_jax import cli, encoder, sharding, storage, workdir
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import Config, MeshConfig, changed
from supmim_jax.config.configdict import to_configdict
from supmim_jax.errors import SetupError
from supmim_jax.formats import files, timm, transformers
from supmim_jax.report.measure import curves, evaluations
from supmim_jax.report.page import METRICS

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
TOLERANCE = 1e-4  # of the largest value: what another runtime may round differently
LARGEST = 2**31  # bytes: jax.export writes a FlatBuffer, whose offsets have 31 bits
OPSET = 21


def write_onnx(
    params: Any, cfg: Config, class_names: Sequence[str] = ()
) -> tuple[dict, dict[str, Any]]:
    """Nothing for model.safetensors, and the other files by name.

    Raises:
      SetupError: jax2onnx is not installed, or onnxruntime computes something else.
    """
    try:
        import jax2onnx
        import onnxruntime
    except ImportError as error:
        raise SetupError(f"--to onnx needs {error.name}: pip install 'supmim_jax[onnx]'.") from None
    function, images, names = _program(params, cfg)

    def write(path: Path) -> None:
        file = {"return_mode": "file", "output_path": str(path), "opset": OPSET}
        labels = {"input_names": ["images"], "output_names": names}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            jax2onnx.to_onnx(lambda x: tuple(function(x).values()), [images], **file, **labels)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns of each constant that it folds
        session = onnxruntime.InferenceSession(str(path), options)
        _compare("onnxruntime", cfg, function, lambda x: session.run(None, {"images": x}))

    return {}, {"model.onnx": write, files.CONFIG: _description(cfg, class_names, names)}


def write_stablehlo(
    params: Any, cfg: Config, class_names: Sequence[str] = ()
) -> tuple[dict, dict[str, Any]]:
    """Nothing for model.safetensors, and the other files by name.

    Raises:
      SetupError: the weights are too many for the format, or the program computes something else.
    """
    size = sum(x.size * 4 for x in jax.tree.leaves(params))
    if size >= LARGEST:
        raise SetupError(
            f"The weights have {size / 1e9:.1f} GB, more than a StableHLO file can hold (2.1 GB). "
            f"Use --to onnx, timm or transformers."
        )
    function, images, names = _program(params, cfg)

    def write(path: Path) -> None:
        program = jax.export.export(jax.jit(function), platforms=PLATFORMS)(images)
        path.write_bytes(program.serialize())
        read = jax.export.deserialize(bytearray(path.read_bytes()))
        _compare("jax.export", cfg, function, lambda x: [read.call(x)[name] for name in names])

    return {}, {"model.stablehlo": write, files.CONFIG: _description(cfg, class_names, names)}


def _program(
    params: Any, cfg: Config
) -> tuple[Callable[[jax.Array], dict[str, jax.Array]], jax.ShapeDtypeStruct, list[str]]:
    """The encoder in float32 with its weights bound, its abstract input, and its outputs' names."""
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
    program = encoder.build_encoder(changed(cfg, model={"dtype": "float32"}), 1, mesh)
    bound = program.bind(params)
    names = {"embedding": "pooled", "tokens": "tokens"}
    if "head" in bound.params:
        names["logits"] = "logits"

    def function(images: jax.Array) -> dict[str, jax.Array]:
        features = bound.features(images)._asdict()
        return {name: features[ours] for name, ours in names.items()}

    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *program.images.shape[1:]), jnp.uint8)
    return function, images, list(names)


def _description(cfg: Config, class_names: Sequence[str], outputs: list[str]) -> dict[str, Any]:
    data = cfg.data
    return {
        "input": f"images: uint8 batch x {data.image_size} x {data.image_size} x {data.channels}",
        "outputs": outputs,
        "image_size": data.image_size,
        "resize_shorter_side": data.eval_resize,
        "resize_filter": data.resize,
        "class_names": list(class_names),
    }


def _compare(runtime: str, cfg: Config, ours: Callable, theirs: Callable) -> None:
    """Raises SetupError unless what was written computes what the encoder computes."""
    shape = (2, cfg.data.image_size, cfg.data.image_size, cfg.data.channels)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    for (name, expected), found in zip(ours(images).items(), theirs(images), strict=True):
        expected = np.asarray(expected)
        difference = np.abs(expected - np.asarray(found)).max() / max(np.abs(expected).max(), 1.0)
        if not difference <= TOLERANCE:
            raise SetupError(
                f"{runtime} computes other {name} from what was written: they differ by "
                f"{difference:.1e} of the largest value, expected {TOLERANCE} at most. Nothing is "
                f"kept; please report it with the versions of {runtime} and jax."
            )


WRITERS = {
    "timm": timm.write,
    "transformers": transformers.write,
    "onnx": write_onnx,
    "stablehlo": write_stablehlo,
}
# How each is loaded; an encoder without a classifier by the line of that name, where there is one.
LOADING = {
    "timm": "import timm\n\nmodel = timm.create_model('local-dir:.', pretrained=True).eval()",
    "transformers": "import transformers\n\n"
    "model = transformers.AutoModelForImageClassification.from_pretrained('.')",
    "transformers encoder": "import transformers\n\n"
    "model = transformers.AutoModel.from_pretrained('.', add_pooling_layer=False)",
    "onnx": "import onnxruntime\n\nsession = onnxruntime.InferenceSession('model.onnx')\n"
    "embedding, *_ = session.run(None, {'images': images})  # uint8 batch x height x width x "
    "channels",
    "stablehlo": "import jax.export\n\nfile = open('model.stablehlo', 'rb')\n"
    "program = jax.export.deserialize(bytearray(file.read()))\n"
    "embedding = program.call(images)['embedding']  # uint8 batch x height x width x channels",
}


def export(location: str, to: str, out: str | os.PathLike) -> str:
    """Writes the checkpoint at `workdir` or `workdir@step` in the format `to`.

    Returns:
      Python code that loads it in the directory `out`.

    Raises:
      SetupError: the checkpoint is missing or not of a classifier or an encoder by itself, `out` is
        not free, or the format cannot hold it.
    """
    out = files.check_free(out)
    checkpoint = Checkpoint.open(location)
    cfg = checkpoint.config
    leaves = cfg.objective.leaves
    if leaves not in ("classifier", "encoder"):
        raise SetupError(
            f"--checkpoint {location} is of objective {cfg.objective.name!r}, which leaves a "
            f"{leaves}, neither a classifier of images nor an encoder by itself: export the run "
            f"that it started from, or another."
        )
    loading = LOADING.get(f"{to} {leaves}", LOADING[to])
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    params = jax.tree.map(np.asarray, encoder.restore(checkpoint, mesh, 1).params)
    names = workdir.class_names(checkpoint.workdir) if leaves == "classifier" else []
    tensors, documents = WRITERS[to](params, cfg, names)
    card = model_card(checkpoint, to, loading, names)
    files.write(out, tensors, documents | {"README.md": card})
    return loading


# --- the model card: a README.md in the form that the Hugging Face hub reads

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


def model_card(checkpoint: Checkpoint, to: str, loading: str, class_names: Sequence[str]) -> str:
    """The README.md of what was exported for the library `to`, in the hub's form.

    Its text is model_card.md, filled in by jinja2.

    Args:
      checkpoint: what was exported.
      to: a key of WRITERS.
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
    data, found = checkpoint.config.data, []
    for name, points in curves(checkpoint.workdir).items():
        value = dict(points).get(checkpoint.step)
        if name.startswith("eval/") and value is not None:
            where = f"{data.name}, split {data.eval_split}"
            found.append(Metric(name.removeprefix("eval/"), value, where))
    for evaluation in evaluations(checkpoint.workdir):
        if re.search(rf"-{checkpoint.step}\.json$", evaluation.source):
            where = f"{evaluation.about} ({evaluation.source})"
            # Not again what training measured on the same images: `probe` gives the same.
            known = {(x.name, x.value) for x in found if x.where in where}
            rows = [row for row in evaluation.metrics.items() if row not in known]
            found += [Metric(*row, where) for row in rows]
    return found


def main() -> None:
    loading = export(CHECKPOINT.value, TO.value, OUT.value)
    print(f"{OUT.value} is written; its README.md is a model card. Load it there by\n\n{loading}")


if __name__ == "__main__":
    CHECKPOINT = storage.define("checkpoint", None, "workdir or workdir@step", required=True)
    TO = flags.DEFINE_enum("to", None, sorted(WRITERS), "Format to write.", required=True)
    OUT = storage.define("out", None, "Directory to make.", required=True, searched=False)
    cli.start(main)
