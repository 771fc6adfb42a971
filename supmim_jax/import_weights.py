"""Makes a checkpoint of ours from another library's ViT.

python -m supmim_jax.import_weights --from timm --path <dir> --workdir runs/imported

Model, image size, channels and classes are those of the file; everything else, such as the data
set that `probe` measures on, is from --config and its overrides. An encoder without a classifier,
such as a published MAE's, becomes a checkpoint of objective `mae` to be probed and fine-tuned.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from etils import epath

from supmim_jax import checkpoint, cli, encoder, optim, sharding, storage
from supmim_jax.batch import TrainState
from supmim_jax.config import Config, MAEConfig, MeshConfig, SupervisedConfig, changed
from supmim_jax.config.configdict import from_configdict, to_configdict
from supmim_jax.errors import SetupError
from supmim_jax.formats import augreg, files, layout, timm, transformers
from supmim_jax.formats.layout import Foreign
from supmim_jax.workdir import CLASS_NAMES

READERS = {"timm": timm.read, "transformers": transformers.read}
SOURCES = ("augreg", *READERS)
WITHOUT_DATA = changed(Config(), data={"name": ""})  # a default would pass for what they learned


def load(
    source: str, path: Path, base: Config = WITHOUT_DATA
) -> tuple[Config, dict, tuple[str, ...]]:
    """The config, the parameters and the names of the classes of the model at `path`.

    There are no names, (), where the file has none.

    Args:
      source: "augreg" or one of READERS; "": of these the one that config.json is of.
      path: a directory or file.
      base: sets the rest of the config.

    Raises:
      SetupError: a file is missing or broken, or is not exactly a model of ours.
    """
    if source == "augreg":
        file = str(path)
        found, arrays = augreg.read(files.read_npz(path), file, base.data.image_size)
    else:
        saved = files.read_directory(path)
        source = source or ("transformers" if "model_type" in saved.config.values else "timm")
        found, arrays, file = READERS[source](saved), saved.arrays, saved.file
    cfg = combine(base, found)
    if left := [name for name in arrays if name.startswith(found.leaves_out)]:
        parts = ", ".join(f"{x}*" for x in sorted({re.match(r"[^./]+[./]?", x)[0] for x in left}))
        print(f"{file}: left out {parts} ({len(left)} arrays), no part of the encoder")
    arrays = {name: x for name, x in arrays.items() if name not in left}
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    like = encoder.build_encoder(cfg, 1, mesh).params
    params = layout.with_our_pixels(layout.from_foreign(arrays, found, like, file), found)
    params = layout.without_fixed_positions(params, cfg.model, cfg.data)
    if "positions" not in params["encoder"]:
        cfg = changed(cfg, model={"positions": "sincos2d"})
    return cfg, params, found.class_names


def combine(base: Config, found: Foreign) -> Config:
    """The config of the model that was found, with everything else from `base`.

    Of a classifier it is supervised. Of an encoder by itself the objective is that of a `base`
    which leaves an encoder, else `mae`, and the classes are those of the data.
    """
    data, evaluation, objective = base.data, base.eval, base.objective
    data = changed(
        data,
        num_classes=found.num_classes or data.num_classes,
        image_size=found.image_size,
        channels=found.channels,
        eval_resize=max(found.eval_resize, found.image_size),
        augment=data.augment if found.channels == 3 else "none",
        resize=found.resize or data.resize,
    )
    if found.num_classes:
        if objective.leaves != "classifier":
            raise SetupError(
                f"--config is of objective {objective.name!r}, which trains no classifier: give "
                f"one that does, as configs/supervised_b14_imagenet1k.py."
            )
        objective = SupervisedConfig(classification=objective.classification)
    else:
        objective = objective if objective.leaves == "encoder" else MAEConfig()
        of_no_head = tuple(x for x in evaluation.which if x not in ("top1", "miou"))
        evaluation = changed(evaluation, which=of_no_head or ("knn",))
    cfg = changed(base, data=data, model=found.model, objective=objective, eval=evaluation)
    return from_configdict(to_configdict(cfg))  # which checks it, by the paths of its fields


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
    base = from_configdict(CONFIG.value) if CONFIG.value is not None else WITHOUT_DATA
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
