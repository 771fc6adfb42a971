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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import conftest  # sets up JAX
import jax
import numpy as np

from supmim_jax import checkpoint, encoder
from supmim_jax.batch import TrainState
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import CheckpointConfig, Config, DataConfig, SupervisedConfig, ViTConfig
from supmim_jax.errors import SetupError
from supmim_jax.train_step import TrainStep

OLD, NEW = 4, 8  # steps that are saved; NEW is damaged
RIGHT, REFUSED, WRONG, CRASHED = "right", "refused", "WRONG", "CRASHED"
COLUMNS = (RIGHT, REFUSED, "some of both", WRONG, CRASHED)


@dataclasses.dataclass
class Saved:
    """A run with two checkpoints, and what was saved in the newer one."""

    workdir: Path
    cfg: Config
    like: TrainState
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
    for step in (OLD, NEW):
        state = conftest.random_state(cfg, step)
        conftest.save(cfg, workdir, state)
    arrays = jax.tree.map(np.asarray, checkpoint.plain(state))
    like = TrainStep.build(cfg, conftest.ON_ONE).state
    run = checkpoint.BEGIN | {"position": 16 * NEW, "seconds": 1.5 * NEW}
    return Saved(workdir, cfg, like, arrays, run)


def files(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file())


def directories(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_dir())


# What there is more of to damage is damaged more often.
MUTATIONS = {
    "bit flipped": 12,
    "file cut off": 4,
    "file appended to": 1,
    "file missing": 1,
    "file added": 1,
    "two files swapped": 4,
    "file of another step": 4,
    "directory missing": 1,
    "directory renamed": 1,
    "item of another step": 1,
    "all of another step": 1,
}


def mutate(kind: str, draw: random.Random, new: Path, old: Path) -> None:
    """Damages the checkpoint in `new` with a key of MUTATIONS; `old` is another step's."""
    path, directory = draw.choice(files(new)), draw.choice(directories(new))
    while kind in ("bit flipped", "file cut off") and not path.stat().st_size:
        path = draw.choice(files(new))
    data = path.read_bytes()
    match kind:
        case "bit flipped":
            changed = bytearray(data)
            changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            path.write_bytes(changed)
        case "file cut off":
            path.write_bytes(data[: draw.randrange(len(data))])
        case "file appended to":
            path.write_bytes(data + draw.randbytes(draw.randint(1, 64)))
        case "file missing":
            path.unlink()
        case "file added":
            path.with_name(f"{path.name}.{draw.randrange(100)}").write_bytes(draw.randbytes(16))
        case "two files swapped":
            other = draw.choice([p for p in files(new) if p.read_bytes() != data])
            path.write_bytes(other.read_bytes())
            other.write_bytes(data)
        case "file of another step":  # its counterpart, or another where that is the same
            others = [p for p in files(old) if p.read_bytes() != data]
            same = [p for p in others if p.relative_to(old) == path.relative_to(new)]
            path.write_bytes(draw.choice(same or others).read_bytes())
        case "directory missing":
            shutil.rmtree(directory)
        case "directory renamed":
            directory.rename(directory.with_name(directory.name + draw.choice("_1x")))
        case "item of another step":
            item = draw.choice(("state", "run"))  # its `config` is the same
            shutil.rmtree(new / item)
            shutil.copytree(old / item, new / item)
        case "all of another step":
            shutil.rmtree(new)
            shutil.copytree(old, new)


def by_training(saved: Saved, workdir: Path) -> bool:
    checkpoints = checkpoint.Checkpoints(workdir, saved.cfg.checkpoint)
    try:
        newest = checkpoints.newest()
        if newest is None or newest.step != NEW:
            return False
        state, run = newest.restore_state(saved.like), newest.run
    finally:
        checkpoints.close()
    return conftest.same(checkpoint.plain(state), saved.state) and run == saved.run


def by_params(saved: Saved, workdir: Path) -> bool:
    like = encoder.build_encoder(saved.cfg, 16, conftest.ON_ONE).params
    opened = Checkpoint.open(f"{workdir}@{NEW}")
    params, wanted = opened.restore_params(like), {x: saved.state["params"][x] for x in like}
    beside = opened.config == saved.cfg and opened.run == saved.run
    return beside and conftest.same(params, wanted)


READERS = {"restore": by_training, "restore_params": by_params}


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
        kind = names[i] if i < len(names) else draw.choices(names, MUTATIONS.values())[0]
        copy = scratch / str(i)
        shutil.copytree(saved.workdir / "checkpoints" / str(NEW), copy / "checkpoints" / str(NEW))
        new, old = copy / "checkpoints" / str(NEW), saved.workdir / "checkpoints" / str(OLD)
        mutate(kind, draw, new, old)
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
