"""Makes a checkpoint of ours from another library's ViT.

python -m supmim_jax.import_weights --from timm --path <dir> --workdir runs/imported

Model, image size, channels and classes are those of the file; everything else, such as the data
set that `probe` measures on, is from --config and its overrides. An encoder without a classifier,
such as a published MAE's, becomes a checkpoint of objective `mae` to be probed and fine-tuned.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath

from supmim_jax import checkpoint, cli, encoder, optim, sharding, storage
from supmim_jax.batch import TrainState
from supmim_jax.config import Config, DataConfig, MAEConfig, MeshConfig, SupervisedConfig
from supmim_jax.config.configdict import from_configdict, to_configdict
from supmim_jax.errors import SetupError
from supmim_jax.formats import augreg, files, layout, timm, transformers
from supmim_jax.formats.layout import Foreign, from_foreign
from supmim_jax.workdir import CLASS_NAMES

READERS = {"timm": timm.read, "transformers": transformers.read}
SOURCES = ("augreg", *READERS)


def load(source: str, path: Path, base: Config) -> tuple[Config, dict, tuple[str, ...]]:
    """The config, the parameters and the names of the classes of the model at `path`.

    `base` sets the rest of the config. Where the file names no classes, there are no names.

    Raises:
      SetupError: a file is missing or broken, or is not exactly a model of ours.
    """
    if source == "augreg":
        file = str(path)
        found, arrays = augreg.read(files.read_npz(path), file, base.data.image_size)
    else:
        arrays, documents, file = files.read_directory(path)
        found = READERS[source](documents, arrays, file)
    cfg = (combine if found.num_classes else combine_encoder)(base, found)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    like = encoder.build_encoder(cfg, 1, mesh).params
    params = from_foreign(encoder_of(arrays, found, file), found.layout, like, file)
    params = layout.with_our_pixels(params, found.mean, found.std, cfg.model.patch)
    params = layout.without_fixed_positions(params, cfg.model, cfg.data)
    if "positions" not in params["encoder"]:
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, positions="sincos2d"))
    return cfg, params, found.class_names


def encoder_of(arrays: dict[str, np.ndarray], found: Foreign, file: str) -> dict[str, np.ndarray]:
    """Without what is no part of the encoder; a line on the terminal says what that is."""
    left = [name for name in arrays if name.startswith(found.leaves_out)]
    if left:
        parts = ", ".join(f"{x}*" for x in sorted({re.match(r"[^./]+[./]?", x)[0] for x in left}))
        print(f"{file}: left out {parts} ({len(left)} arrays), no part of the encoder")
    return {name: x for name, x in arrays.items() if not name.startswith(found.leaves_out)}


def combine(base: Config, found: Foreign) -> Config:
    """The supervised config of the model that was found, with everything else from `base`."""
    if base.objective.leaves != "classifier":
        raise SetupError(
            f"--config is of objective {base.objective.name!r}, which trains no classifier: give "
            f"one that does, as configs/supervised_b14_imagenet1k.py."
        )
    objective = SupervisedConfig(classification=base.objective.classification)
    data = dataclasses.replace(images(base.data, found), num_classes=found.num_classes)
    cfg = dataclasses.replace(base, data=data, model=found.model, objective=objective)
    return from_configdict(to_configdict(cfg))


def combine_encoder(base: Config, found: Foreign) -> Config:
    """As `combine`, for an encoder by itself; the classes are those of the data.

    The objective is that of a `base` which leaves an encoder, else `mae`.
    """
    objective = base.objective if base.objective.leaves == "encoder" else MAEConfig()
    heads = ("top1", "miou")  # evaluations of a head, and there is none
    which = tuple(name for name in base.eval.which if name not in heads) or ("knn",)
    cfg = dataclasses.replace(
        base,
        data=images(base.data, found),
        model=found.model,
        objective=objective,
        eval=dataclasses.replace(base.eval, which=which),
    )
    return from_configdict(to_configdict(cfg))


def images(data: DataConfig, found: Foreign) -> DataConfig:
    """The data of the config, as images for the model that was found."""
    return dataclasses.replace(
        data,
        image_size=found.image_size,
        channels=found.channels,
        eval_resize=max(found.eval_resize, found.image_size),
        augment=data.augment if found.channels == 3 else "none",
        resize=found.resize or data.resize,
    )


def save(workdir: epath.Path, cfg: Config, params: dict, class_names: Sequence[str] = ()) -> None:
    """Writes the checkpoint of step 0, with an optimizer that has not seen anything.

    Raises:
      SetupError: the workdir holds something already, or cannot be written.
    """
    try:
        if workdir.exists() and any(workdir.iterdir()):
            raise SetupError(f"--workdir {workdir} is not empty. Choose another.")
        params = jax.tree.map(jnp.asarray, params)
        state = TrainState(jnp.zeros((), jnp.int32), params, {}, optim.make(cfg).init(params))
        checkpoints = checkpoint.Checkpoints(workdir, cfg.checkpoint)
        if class_names:
            storage.write_json(workdir / CLASS_NAMES, list(class_names))
        storage.write_json(workdir / "config.json", to_configdict(cfg).to_dict())
        checkpoints.save(state, cfg, checkpoint.BEGIN)
        checkpoints.close()
    except OSError as error:
        raise SetupError(f"--workdir {workdir} cannot be written: {error}.") from None


def main() -> None:
    base = from_configdict(CONFIG.value) if CONFIG.value is not None else Config()
    with storage.fetched(epath.Path(PATH.value)) as path:
        cfg, params, class_names = load(FROM.value, path, base)
    save(epath.Path(WORKDIR.value), cfg, params, class_names)
    print(f"{WORKDIR.value}: {cfg.model}")


if __name__ == "__main__":
    CONFIG = cli.define("Data set and the rest: a config file")
    FROM = flags.DEFINE_enum("from", None, SOURCES, "Library that wrote it.", required=True)
    PATH = storage.define(
        "path", None, "Directory with model.safetensors, or .npz.", required=True, searched=False
    )
    WORKDIR = storage.define("workdir", None, "Directory to make.", required=True)
    cli.start(main)
