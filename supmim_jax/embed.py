"""Writes the embeddings of many images: of a folder, or of a split of a data set.

  python -m supmim_jax.embed --checkpoint runs/b14 --images photos --out photos.npz
  python -m supmim_jax.embed --checkpoint runs/b14 --name imagenet2012 --split validation --out val

--out ends in .npz or .parquet, or is a directory for one .npz per shard. Each has `embedding` NxD
and `name` N, the path in the folder or the number of the record; of a data set with labels `label`
N. An image that cannot be read is named on stderr and in <out>.broken.txt, and has no row. Run
again, the command goes on with the shards that are missing; several processes (--distributed)
share them.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from tqdm import tqdm

from supmim_jax import cli, inference, multihost, storage
from supmim_jax.config import DataConfig, changed
from supmim_jax.data import source
from supmim_jax.data.decode import BrokenRecord
from supmim_jax.data.worker import prefetched
from supmim_jax.errors import SetupError
from supmim_jax.inference import BrokenImage, Encoder

PLAN = "plan.json"
PATIENCE = 86400  # seconds for other processes to do their share
DTYPES = ("float32", "float16", "bfloat16")


class Images(NamedTuple):
    """What is to be embedded, and what tells it from other images."""

    names: Sequence
    record: Callable[[int], dict]  # by index; may raise OSError or BrokenRecord
    identity: dict[str, str]


def folder(path: epath.Path) -> Images:
    """The image files below a folder."""
    names = inference.image_files(path)
    for name in names:
        if name.encode(errors="ignore").decode() != name:
            raise SetupError(
                f"{path} has a file {name!a}, whose name is not UTF-8. Rename it: the names "
                f"stand beside the embeddings."
            )
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    identity = {"images": str(path), "files": digest}
    return Images(names, lambda i: {"image": (path / names[i]).read_bytes()}, identity)


def split(cfg: DataConfig, name: str) -> Images:
    """A split of a data set of tfds; the names are the numbers of its records."""
    opened = source.Source(cfg)
    records = opened.records(name, beside="")
    identity = {"name": cfg.name, "split": name, "version": opened.version}
    return Images(range(len(records)), records.__getitem__, identity)


def embed(
    encoder: Encoder,
    images: Images,
    out: epath.Path,
    *,
    checkpoint: str,
    batch_size: int = inference.BATCH_SIZE,
    dtype: str = "float32",
    shard: int = 2**14,
) -> dict[str, int]:
    """Writes the embeddings; each process writes its share, and the first one joins them.

    Args:
      encoder: on this process's devices.
      images: from `folder` or `split`.
      out: *.npz, *.parquet, or a directory.
      checkpoint: its name, which goes on with shards of the same alone.
      dtype: of DTYPES. numpy shows bfloat16 as 2 raw bytes: x.view(ml_dtypes.bfloat16).
      shard: images of a shard, which is what a restart may lose.

    Returns:
      How many images were embedded by this process, and how many of all are broken.

    Raises:
      SetupError: `out` holds another command's shards, or is of a form that is not written.
    """
    if out.suffix == ".parquet" and (dtype == "bfloat16" or not find_spec("pyarrow")):
        raise SetupError(
            f"--out {out}: Parquet is written by pyarrow (pip install -e '.[parquet]'), as float32 "
            f"or float16. Take .npz instead."
        )
    single = out.suffix in (".npz", ".parquet")
    if out.suffix[1:2].isalpha() and not single and not out.is_dir():
        raise SetupError(
            f"--out {out}: no {out.suffix} is written. Take *.npz, *.parquet, or for a directory a "
            f"name without such an ending."
        )
    if single and out.exists():
        raise SetupError(f"--out {out} already exists. Choose another, or remove it first.")
    parts = out.with_name(f"{out.name}.parts") if single else out
    plan = {"checkpoint": checkpoint, "dtype": dtype, "shard": shard, **images.identity}
    _begin(parts, plan)

    count = len(images.names)
    rows = [range(count)[at : at + shard] for at in range(0, count, shard)]
    paths = [parts / f"embeddings-{i:05d}-of-{len(rows):05d}.npz" for i in range(len(rows))]
    mine = range(jax.process_index(), len(rows), jax.process_count())
    missing = [i for i in mine if not paths[i].exists()]
    every = 1.0 if sys.stderr.isatty() else 30.0  # seconds between lines of a log
    embedded, total = 0, sum(len(rows[i]) for i in missing)
    with tqdm(total=total, unit="image", mininterval=every, file=sys.stderr) as bar:
        for i in missing:
            arrays = _embedded(encoder, images, rows[i], batch_size, bar)
            embedded += len(arrays["name"])
            arrays["embedding"] = arrays["embedding"].astype(jnp.dtype(dtype))
            _write_npz(paths[i], arrays)
    multihost.gather("embedded", "done", PATIENCE)
    broken = _finish(out, parts, paths, single) if jax.process_index() == 0 else 0
    multihost.gather("written", "done", PATIENCE)
    return {"embedded": embedded, "broken": broken}


def _begin(parts: epath.Path, plan: dict) -> None:
    """Makes the directory of the shards, or checks that its shards follow the same plan."""
    path = parts / PLAN
    if path.exists():
        found = storage.read_json(path, "Remove the directory to begin anew.")
        if found != plan:
            raise SetupError(
                f"{parts} holds embeddings of {json.dumps(found)}; asked for are "
                f"{json.dumps(plan)}. Choose another --out, or remove that directory."
            )
    elif jax.process_index() == 0:
        if parts.exists() and any(parts.iterdir()):
            raise SetupError(f"--out {parts} is not empty. Choose another, or remove it first.")
        storage.make_directory(parts)
        storage.write_json(path, plan)


def _embedded(
    encoder: Encoder, images: Images, rows: range, batch_size: int, bar: tqdm
) -> dict[str, np.ndarray]:
    """The arrays of a shard."""
    names, labels, broken = [], [], []

    def read(index: int) -> tuple[str, np.ndarray | str, int | None]:
        """Name, pixels or what is wrong with them, and label."""
        name = str(images.names[index])
        try:
            record = images.record(index)
            pixels = encoder.prepared(record["image"], name, record.get("floats", False))
        except (BrokenImage, BrokenRecord, OSError) as error:
            return name, str(error), None
        return name, pixels, record.get("label")

    def whole() -> Iterator[np.ndarray]:
        for name, pixels, label in prefetched(read, rows):
            bar.update()
            if isinstance(pixels, str):
                bar.write(f"left out: {pixels}", file=sys.stderr)
                broken.append((name, pixels))
                continue
            names.append(name)
            if label is not None:
                labels.append(int(label))
            yield pixels

    batches = [np.zeros((0, encoder.config.model.width), np.float32)]  # where all are broken
    for count, features in encoder.batches(whole(), batch_size):
        batches.append(np.asarray(features.pooled)[:count])
    arrays = {
        "embedding": np.concatenate(batches),
        "name": np.array(names, dtype=str),
        "broken": np.array(broken, dtype=str).reshape(-1, 2),
    }
    return arrays | ({"label": np.array(labels, np.int32)} if labels else {})


def _finish(out: epath.Path, parts: epath.Path, paths: list[epath.Path], single: bool) -> int:
    """Joins the shards if one file was asked for, and lists the broken images."""
    shards = []
    for path in paths:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            shards.append(dict(arrays))
    broken = [f"{name}\t{fault}\n" for x in shards for name, fault in x.pop("broken").tolist()]
    if broken:
        storage.write(out.with_name(f"{out.name}.broken.txt"), "".join(broken))
    if single:
        names = dict.fromkeys(name for x in shards for name in x)
        arrays = {name: np.concatenate([x[name] for x in shards if name in x]) for name in names}
        (_write_parquet if out.suffix == ".parquet" else _write_npz)(out, arrays)
        parts.rmtree()
    return len(broken)


def _write_npz(out: epath.Path, arrays: dict[str, np.ndarray]) -> None:
    with storage.written(out) as path, path.open("wb") as file:
        np.savez(file, **arrays)


def _write_parquet(out: epath.Path, arrays: dict[str, np.ndarray]) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = {name: pyarrow.array(x) for name, x in arrays.items() if name != "embedding"}
    rows = arrays["embedding"]
    flat = pyarrow.array(rows.reshape(-1))
    columns["embedding"] = pyarrow.FixedSizeListArray.from_arrays(flat, rows.shape[1])
    with storage.written(out) as path:
        parquet.write_table(pyarrow.table(columns), str(path))


def main() -> None:
    cli.join()
    if bool(IMAGES.value) == bool(NAME.value):
        raise SetupError("Give either --images=<folder> or --name=<data set> with --split.")
    encoder = inference.load(CHECKPOINT.value, max_value=MAX_VALUE.value)
    if IMAGES.value:
        images = folder(epath.Path(IMAGES.value))
    else:
        data = encoder.config.data
        data = changed(data, name=NAME.value, data_dir=DATA_DIR.value or data.data_dir)
        images = split(data, SPLIT.value)
    begin = time.perf_counter()
    done = embed(
        encoder,
        images,
        epath.Path(OUT.value),
        checkpoint=encoder.location,
        batch_size=BATCH_SIZE.value,
        dtype=DTYPE.value,
        shard=SHARD.value,
    )
    seconds, whole = time.perf_counter() - begin, len(images.names) - done["broken"]
    print(
        f"{OUT.value}: {whole} embeddings, {done['broken']} broken images; {done['embedded']} "
        f"embedded here, {done['embedded'] / seconds:.0f} images/s."
    )


if __name__ == "__main__":
    CHECKPOINT = storage.define(
        "checkpoint", None, "workdir, workdir@step, or what `export` wrote.", required=True
    )
    IMAGES = storage.define("images", "", "Folder with images.", searched=False)
    NAME = flags.DEFINE_string("name", "", "Data set of tfds, in place of a folder.")
    SPLIT = flags.DEFINE_string("split", "validation", "Its split.")
    DATA_DIR = storage.define("data_dir", "", "Where it is; default: as the run had it.")
    OUT = storage.define("out", None, "*.npz, *.parquet or a directory.", required=True)
    BATCH_SIZE = flags.DEFINE_integer("batch_size", inference.BATCH_SIZE, "Images.", lower_bound=1)
    DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "Of the embeddings.")
    MAX_VALUE = flags.DEFINE_float("max_value", 0.0, "White, in images of more than 8 bits.")
    SHARD = flags.DEFINE_integer("shard", 2**14, "Images of a shard.", lower_bound=1)
    cli.define_process_flags()
    cli.start(main)
