"""How well an encoder's boxes (ContrastiveCrop's) find what the images show, by their masks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from supmim_jax import contrastive_boxes, sharding, storage
from supmim_jax import encoder as encoder_module
from supmim_jax.batch import Encoder
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import IGNORED, Config, MeshConfig
from supmim_jax.data import source as source_module
from supmim_jax.data.decode import decode_both
from supmim_jax.data.transforms import CENTRE, UNITS, WHOLE, whole_image
from supmim_jax.errors import SetupError

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
GROUND = 0  # the class of a mask's pixels that show nothing


def command() -> Callable[[], None]:
    """Defines the flags of this bench; what it returns runs once they are parsed."""
    location = storage.define("checkpoint", None, "workdir or workdir@step", required=True)
    split = flags.DEFINE_string("split", "test", "Split with masks.")
    most = flags.DEFINE_integer("images", 1200, "The first images of it.", lower_bound=1)

    def run() -> None:
        checkpoint = Checkpoint.open(location.value)
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        encoder = encoder_module.restore(checkpoint, mesh)
        print(report(measure(encoder, checkpoint.config, split.value, most.value)))

    return run


def measure(encoder: Encoder, cfg: Config, split: str, most: int) -> dict[str, tuple[float, float]]:
    """Mean IoU with the boxes of the masks, and mean share of the image, by kind of box.

    Raises:
      SetupError: the data have no masks.
    """
    if not cfg.data.masks.field:
        raise SetupError(
            "config.data.masks.field of the checkpoint is empty: boxes are judged by masks. Train "
            "on data that have them."
        )
    source = source_module.Source(cfg.data).records(split, "mask")
    images, truth = [], []
    for i in range(min(most, len(source))):
        image, mask = decode_both(source[i], cfg.data, i)
        shown = (mask != GROUND) & (mask != IGNORED)
        if shown.any():
            images.append(whole_image(image, cfg.data))
            truth.append(around(shown))
    images, truth = np.stack(images), np.stack(truth)
    step = cfg.eval.batch_size
    heat = np.concatenate(
        [
            contrastive_boxes.heat(encoder, jnp.asarray(images[i : i + step]))
            for i in range(0, len(images), step)
        ]
    )
    found = {"whole image": np.tile(WHOLE, (len(truth), 1)) / UNITS}
    found["centre"] = np.tile(CENTRE, (len(truth), 1)) / UNITS
    for threshold in THRESHOLDS:
        boxes = contrastive_boxes.bounds(jnp.asarray(heat), cfg.data.image_size, threshold)
        found[f"heat map > {threshold}"] = np.asarray(boxes) / UNITS
    return {name: (float(iou(x, truth).mean()), float(area(x).mean())) for name, x in found.items()}


def around(shown: np.ndarray) -> np.ndarray:
    """The box of what is True in a bool HxW: top, left, bottom, right as shares of the image."""
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    height, width = shown.shape
    ends = (rows[-1] + 1) / height, (columns[-1] + 1) / width
    return np.array([rows[0] / height, columns[0] / width, *ends])


def area(boxes_Nx4: np.ndarray) -> np.ndarray:
    """Shares of the image, N."""
    return np.prod(np.maximum(boxes_Nx4[:, 2:] - boxes_Nx4[:, :2], 0.0), axis=1)


def iou(a_Nx4: np.ndarray, b_Nx4: np.ndarray) -> np.ndarray:
    """Intersection over union of each pair of boxes, N."""
    first, last = np.maximum(a_Nx4[:, :2], b_Nx4[:, :2]), np.minimum(a_Nx4[:, 2:], b_Nx4[:, 2:])
    both = area(np.concatenate([first, last], axis=1))
    return both / (area(a_Nx4) + area(b_Nx4) - both)


def report(found: dict[str, tuple[float, float]]) -> str:
    """A Markdown table."""
    rows = [f"| {name} | {score:.3f} | {share:.2f} |" for name, (score, share) in found.items()]
    head = ["| box | mean IoU with the mask's box | share of the image |", "|---|---|---|"]
    return "\n".join(head + rows)
