"""Damages a real checkpoint in random ways: what is restored is right, or is refused.

python tests/fuzz_checkpoint.py --mutations 500 --seed 0

Each mutation is one change to a fresh copy, which all that reads checkpoints then reads. Prints how
many of each kind were read right or refused (SetupError); exits with 1 if one was read wrong, or
ended in another exception.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import conftest  # noqa: F401  sets up JAX
import jax
import numpy as np

from supmim_jax import checkpoint, encoder, sharding, train_step
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    MeshConfig,
    SupervisedConfig,
    ViTConfig,
)
from supmim_jax.errors import SetupError

OLD, NEW = 4, 8  # steps that are saved; NEW is damaged
RIGHT, REFUSED, WRONG, CRASHED = "right", "refused", "WRONG", "CRASHED"
COLUMNS = (RIGHT, REFUSED, "some of both", WRONG, CRASHED)


@dataclasses.dataclass
class Saved:
    """A run with two checkpoints, and what was saved in the newer one."""

    workdir: Path
    cfg: Config
    built: train_step.TrainStep
    state: dict
    run: dict


def save(workdir: Path) -> Saved:
    """Two checkpoints of different random numbers."""
    cfg = Config(
        batch_size=16,
        epochs=3,
        data=DataConfig(train_examples=64),
        model=ViTConfig(width=32, depth=2, mlp_dim=64, heads=2),
        objective=SupervisedConfig(),
        checkpoint=CheckpointConfig(every=4),
    )
    built = train_step.build(cfg, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    checkpoints = checkpoint.Checkpoints(workdir, cfg.checkpoint)
    for step in (OLD, NEW):
        numbers = np.random.default_rng(step)
        state = jax.tree.map(lambda x: numbers.normal(size=x.shape), built.state).replace(step=step)  # noqa: B023
        run = checkpoint.BEGIN | {"position": 16 * step, "seconds": 1.5 * step}
        checkpoints.save(sharding.put(state, built.state), cfg, run)
    checkpoints.close()
    arrays = jax.tree.map(lambda x, like: np.asarray(x, like.dtype), state, built.state)
    return Saved(workdir, cfg, built, checkpoint.plain(arrays), run)


def files(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file())


def directories(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_dir())


def flip(draw: random.Random, new: Path, old: Path) -> None:
    path = draw.choice([p for p in files(new) if p.stat().st_size])
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(draw: random.Random, new: Path, old: Path) -> None:
    path = draw.choice([p for p in files(new) if p.stat().st_size])
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def append(draw: random.Random, new: Path, old: Path) -> None:
    with draw.choice(files(new)).open("ab") as file:
        file.write(draw.randbytes(draw.randint(1, 64)))


def remove(draw: random.Random, new: Path, old: Path) -> None:
    draw.choice(files(new)).unlink()


def add(draw: random.Random, new: Path, old: Path) -> None:
    beside = draw.choice(files(new))
    beside.with_name(f"{beside.name}.{draw.randrange(100)}").write_bytes(draw.randbytes(16))


def swap(draw: random.Random, new: Path, old: Path) -> None:
    one = draw.choice(files(new))
    data = one.read_bytes()
    other = draw.choice([p for p in files(new) if p.read_bytes() != data])
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def replace(draw: random.Random, new: Path, old: Path) -> None:
    """A file gets the content of its counterpart in the older checkpoint, or of another there."""
    path = draw.choice(files(new))
    others = [p for p in files(old) if p.read_bytes() != path.read_bytes()]
    same = [p for p in others if p.relative_to(old) == path.relative_to(new)]
    path.write_bytes(draw.choice(same or others).read_bytes())


def remove_directory(draw: random.Random, new: Path, old: Path) -> None:
    shutil.rmtree(draw.choice(directories(new)))


def rename_directory(draw: random.Random, new: Path, old: Path) -> None:
    path = draw.choice(directories(new))
    path.rename(path.with_name(path.name + draw.choice("_1x")))


def replace_directory(draw: random.Random, new: Path, old: Path) -> None:
    """An item of the older checkpoint in the place of the newer one's."""
    item = draw.choice(("state", "run"))  # its `config` is the same
    shutil.rmtree(new / item)
    shutil.copytree(old / item, new / item)


def replace_step(draw: random.Random, new: Path, old: Path) -> None:
    """All of the older checkpoint under the name of the newer one."""
    shutil.rmtree(new)
    shutil.copytree(old, new)


MUTATIONS: dict[str, Callable[[random.Random, Path, Path], None]] = {
    "bit flipped": flip,
    "file cut off": truncate,
    "file appended to": append,
    "file missing": remove,
    "file added": add,
    "two files swapped": swap,
    "file of another step": replace,
    "directory missing": remove_directory,
    "directory renamed": rename_directory,
    "item of another step": replace_directory,
    "all of another step": replace_step,
}
# What there is more of to damage is damaged more often.
WEIGHTS = {"bit flipped": 12, "file cut off": 4, "two files swapped": 4, "file of another step": 4}


def same(found, wanted) -> bool:
    return jax.tree.structure(found) == jax.tree.structure(wanted) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted))
    )


def by_training(saved: Saved, workdir: Path) -> bool:
    checkpoints = checkpoint.Checkpoints(workdir, saved.cfg.checkpoint)
    try:
        newest = checkpoints.newest()
        if newest is None or newest.step != NEW:
            return False
        state, run = newest.restore_state(saved.built.state), newest.run
    finally:
        checkpoints.close()
    return same(checkpoint.plain(state), saved.state) and run == saved.run


def by_params(saved: Saved, workdir: Path) -> bool:
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    like = encoder.build_encoder(saved.cfg, 16, mesh).params
    params = Checkpoint.open(f"{workdir}@{NEW}").restore_params(like)
    return same(params, {name: saved.state["params"][name] for name in like})


def by_config(saved: Saved, workdir: Path) -> bool:
    return Checkpoint.open(f"{workdir}@{NEW}").config == saved.cfg


def by_run(saved: Saved, workdir: Path) -> bool:
    return Checkpoint.open(f"{workdir}@{NEW}").run == saved.run


READERS = {
    "restore": by_training,
    "restore_params": by_params,
    "read_config": by_config,
    "read_run": by_run,
}


def outcomes(saved: Saved, workdir: Path) -> dict[str, str]:
    """What each reader makes of a run's directory, and for a crash its traceback."""
    found = {}
    for name, read in READERS.items():
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                found[name] = RIGHT if read(saved, workdir) else WRONG
        except SetupError:
            found[name] = REFUSED
        except Exception:
            found[name] = f"{CRASHED} {traceback.format_exc()}"
    return found


def column(found: dict[str, str]) -> str:
    kinds = {text.split()[0] for text in found.values()}
    return next((k for k in (CRASHED, WRONG) if k in kinds), min(kinds) if len(kinds) == 1 else "")


def fuzz(saved: Saved, mutations: int, seed: int, scratch: Path) -> tuple[dict, list[str]]:
    """Counts by (kind, column), and what must not be, in words.

    Every kind comes at least once, if there are as many mutations.
    """
    draw, counts, failures = random.Random(seed), collections.Counter(), []
    names = list(MUTATIONS)
    for i in range(mutations):
        weights = [WEIGHTS.get(name, 1) for name in names]
        kind = names[i] if i < len(names) else draw.choices(names, weights)[0]
        copy = scratch / str(i)
        shutil.copytree(saved.workdir / "checkpoints" / str(NEW), copy / "checkpoints" / str(NEW))
        new, old = copy / "checkpoints" / str(NEW), saved.workdir / "checkpoints" / str(OLD)
        MUTATIONS[kind](draw, new, old)
        found = outcomes(saved, copy)
        where = column(found) or "some of both"
        counts[kind, where] += 1
        if where in (WRONG, CRASHED):
            failures.append(f"mutation {i} of seed {seed}, {kind}: {found}")
        shutil.rmtree(copy)
    return counts, failures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mutations", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        saved = save(Path(scratch, "run"))
        if set(outcomes(saved, saved.workdir).values()) != {RIGHT}:
            sys.exit("The checkpoint is not read right as it was saved.")
        counts, failures = fuzz(saved, asked.mutations, asked.seed, Path(scratch))
    print(f"{'mutation':22}" + "".join(f"{name:>14}" for name in COLUMNS))
    for kind in (*MUTATIONS, "all"):
        row = [
            sum(n for (k, c), n in counts.items() if c == x and kind in (k, "all")) for x in COLUMNS
        ]
        print(f"{kind:22}" + "".join(f"{n:14}" for n in row))
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
