"""Random damage to data: what is read is right, or refused by name; never silently wrong.

  python tests/fuzz_data.py --what arrayrecord --mutations 500
  python tests/fuzz_data.py --what cache --mutations 500

Each mutation is done to a copy of a whole data set (as data.prepare writes it) or token cache, and
undone afterwards. All of it is then read by the product's own path, `Dataset.open`, training and
evaluation, and every record and every entry of the cache one by one. That happens in a child
process, so that a crash or a hang is an outcome, too. With --unsealed the data set has no
seals.json, as tfds's own builder leaves it; then files may take each other's places unnoticed.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cv2
import numpy as np
from absl import logging
from etils import epath

from supmim_jax import config as schema
from supmim_jax.config import Config
from supmim_jax.data import source as source_module
from supmim_jax.data import token_cache, transforms
from supmim_jax.data.decode import BrokenRecord
from supmim_jax.data.loader import Dataset
from supmim_jax.data.prepare import folder, output
from supmim_jax.errors import SetupError

NAME, EXAMPLES, CLASSES, HELD_OUT, VIEWS = "specimens", 36, 3, 9, 3
SHARD_END = 256  # bytes at each end that a seal is of: the shards are small
TIMEOUT = 60.0  # seconds for one mutation
SPLITS = {"train": EXAMPLES, "validation": HELD_OUT}
RIGHT, REFUSED, REPLACED = "right values", "refused by name", "broken records replaced and counted"
MOVED = "whole records under other ids"  # of data without seals, where shards changed places


class Moved(Exception):
    """A record is whole, but has the id of another."""


def config(root: Path, cached: bool) -> Config:
    """A run of two epochs on the specimens."""
    data = {"name": NAME, "data_dir": str(root / "data"), "train_examples": EXAMPLES}
    data |= {"num_classes": CLASSES, "max_broken": 1.0, "flip": False, "threads": 1}
    return Config(
        batch_size=6,
        epochs=2,
        data=schema.DataConfig(**data),
        model=schema.ViTConfig(width=16, depth=1, mlp_dim=16),
        objective=schema.SupMIMConfig(target=schema.PatchCodesConfig(codes=16)),
        tokens=schema.TokensConfig(cache=str(root / "cache") if cached else "", views=VIEWS),
    )


def make(root: Path) -> None:
    """The data set, whose images' brightness is their id in the split, and its token cache."""
    for split, count in (("train", EXAMPLES), ("val", HELD_OUT)):
        for i in range(count):
            noise = np.random.default_rng(i).integers(0, 9, (24, 24, 3), np.uint8)
            path = root / "photos" / split / f"class_{i * CLASSES // count}" / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(cv2.imencode(".png", noise // 9 + np.uint8(4 * i))[1].tobytes())
    output.RECORDS_PER_SHARD, source_module.SHARD_END = 12, SHARD_END
    folder.prepare(epath.Path(root / "photos"), NAME, str(root / "data"))
    cfg = config(root, cached=False)
    (root / "cache").mkdir()
    plan = token_cache.Plan(
        fingerprint=token_cache.fingerprint(cfg, "0" * 64, "1.0.0"),
        **{"views": VIEWS, "examples": EXAMPLES, "tokens": 25, "codes": 16},
        records_per_shard=27,
    )
    (root / "cache" / token_cache.MANIFEST).write_text(json.dumps(plan.manifest, indent=2))
    source = Dataset(cfg).training_records()
    for index in range(plan.shards):
        marks = (source_module.mark(source[i % EXAMPLES]["image"]) for i in plan.shard(index))
        rows = zip(map(tokens, plan.shard(index)), marks)
        token_cache.write_shard(epath.Path(root / "cache"), plan, index, rows)


def tokens(record: int) -> np.ndarray:
    """What the cache holds of a record."""
    return np.random.default_rng([record, 7]).integers(0, 16, 25, np.uint16)


def read(root: Path, what: str) -> str:
    """Reads everything as training and evaluation do, and tells what came of it."""
    cfg = config(root, cached=what == "cache")
    try:
        dataset = Dataset.open(cfg)
        replaced = read_training(dataset)
        for split, count in SPLITS.items():
            replaced += read_split(dataset, split, count)
        if what == "cache":
            read_cache(dataset)
    except Moved:
        sealed = (root / "data" / NAME / "1.0.0" / source_module.CHECKSUMS).exists()
        assert not (sealed or what == "cache"), "records under other ids"
        return MOVED
    except SetupError as error:
        text = str(error)
        assert str(root) in text or NAME in text or "config." in text, f"nothing is named: {text}"
        return REFUSED
    return REPLACED if replaced else RIGHT


def read_training(dataset: Dataset) -> int:
    """Broken records in the batches of the run; asserts that the others are right."""
    size, seen = dataset.cfg.batch_size, 0
    fed = dataset.train_on_host(range(size))
    for arrays in fed:
        check_examples(arrays, EXAMPLES)
        if dataset.tokens:
            view = seen // EXAMPLES
            for example, ids in zip(arrays["id"].tolist(), arrays["tokens"], strict=True):
                assert (ids == tokens(view * EXAMPLES + example)).all(), "wrong tokens"
        seen += len(arrays["id"])
    assert seen == 2 * EXAMPLES, "another number of examples"
    return fed.broken


def read_split(dataset: Dataset, split: str, count: int) -> int:
    """Broken records of a split, by evaluation's path and one by one."""
    records, broken = dataset.records(split), 0
    assert len(records) == count, "another number of records"
    for i in range(count):
        try:
            if records[i]["label"] != i * CLASSES // count:
                raise Moved
        except BrokenRecord:
            broken += 1
    make = transforms.EvalExample(dataset.cfg.data)
    fed = dataset.once_on_host(split, range(dataset.cfg.eval.batch_size), make)
    for arrays in fed:
        check_examples(arrays, count)
    return broken + fed.broken


def check_examples(arrays: dict, count: int) -> None:
    """Asserts that every example that counts is the one that its id says."""
    fields = (arrays[name] for name in ("image", "label", "weight", "id"))
    for image, label, weight, i in zip(*fields, strict=True):
        if weight and not (image == 128).all():  # grey stands for an image that is broken
            shown = round(float(image.mean()) / 4)
            assert label == shown * CLASSES // count, "a label of another image"
            if shown != i:
                raise Moved


def read_cache(dataset: Dataset) -> None:
    source = dataset.training_records()
    for record in range(VIEWS * EXAMPLES):
        view, i = divmod(record, EXAMPLES)
        ids = dataset.tokens.read(view, i, source[i]["image"])
        assert (ids == tokens(record)).all(), "wrong tokens"


def mutate(files: list[Path], draw: random.Random) -> str:
    """Damages one of the files, or two; tells how."""
    path, before = draw.choice(files), [path.read_bytes() for path in files]
    alike = [x for x in files if x != path and is_metadata(x) == is_metadata(path)]
    kinds: list[Callable] = [flip, flip, cut, append, zero]
    kinds += [swap, duplicate] if alike else []
    kinds += 4 * [edit] if is_metadata(path) else []
    kind = draw.choice([*kinds, remove])
    while all(x.exists() for x in files) and before == [x.read_bytes() for x in files]:
        kind(path, alike, draw)
    return f"{kind.__name__}: {'metadata' if is_metadata(path) else 'shard'}"


def is_metadata(path: Path) -> bool:
    return path.suffix in (".json", ".txt")


def overwrite(path: Path, at: int, new: bytes) -> None:
    content = path.read_bytes()
    path.write_bytes((content[:at] + new)[: len(content)] + content[at + len(new) :])


def place(content: bytes, draw: random.Random) -> int:
    """Of a byte, mostly of one that is not padding."""
    at = draw.randrange(len(content))
    while not content[at] and draw.random() < 0.99:
        at = draw.randrange(len(content))
    return at


def flip(path: Path, _, draw: random.Random) -> None:
    content = path.read_bytes()
    at = place(content, draw)
    overwrite(path, at, bytes([content[at] ^ 1 << draw.randrange(8)]))


def zero(path: Path, _, draw: random.Random) -> None:
    overwrite(path, place(path.read_bytes(), draw), bytes(draw.choice((8, 64, 512, 4096))))


def cut(path: Path, _, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def remove(path: Path, *_) -> None:
    path.unlink()


def append(path: Path, _, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.choice((1, 16, 4096, 65536))))


def swap(path: Path, alike: list[Path], draw: random.Random) -> None:
    """Swaps two files of a kind, as a copy that went wrong might."""
    other, mine = draw.choice(alike), path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(mine)


def duplicate(path: Path, alike: list[Path], draw: random.Random) -> None:
    """One file in place of another."""
    path.write_bytes(draw.choice(alike).read_bytes())


def edit(path: Path, _, draw: random.Random) -> None:
    """Another value in metadata: a number, a text, a key or a line."""
    if path.suffix == ".txt":
        lines = path.read_text().splitlines()
        draw.choice((lines.reverse, lines.pop, lambda: lines.append("../../x")))()
        path.write_text("\n".join(lines) + "\n")
        return
    values = json.loads(path.read_text())
    holder, key = draw.choice(list(places(values)))
    old = holder[key]
    new = [None, "", "../../x", "x", [], {}, 0, -1, 2**63, [[]], "12", ["11", "13", "12"], True]
    number = isinstance(old, int) or (isinstance(old, str) and old.isdecimal())
    holder[key] = draw.choice([int(old) + 1, str(int(old) - 1), *new] if number else new)
    if draw.random() < 0.2:
        del holder[key]
    path.write_text(json.dumps(values))


def places(values) -> Iterator[tuple]:
    """Every container and key in nested JSON."""
    for key in values if isinstance(values, dict) else range(len(values)):
        yield values, key
        if isinstance(values[key], dict | list):
            yield from places(values[key])


def child(root: Path, what: str) -> None:
    """Answers a line for each line that comes in: the outcome of reading."""
    source_module.SHARD_END = SHARD_END
    logging.set_verbosity(logging.FATAL)
    for _ in sys.stdin:
        try:
            found = read(root, what)
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            at = [x for x in frames if "/tests/" not in x.filename]
            where = f"{Path(at[-1].filename).name}:{at[-1].lineno}" if at else "here"
            found = f"VIOLATION {type(error).__name__} at {where}: {str(error)[:300]!r}"
        print(f"outcome {' '.join(found.split())}", flush=True)


class Reader:
    """The child process; a new one after a crash or a hang."""

    def __init__(self, root: Path, what: str):
        self.command = (sys.executable, __file__, "--child", str(root), "--what", what)
        self.process = None

    def __call__(self) -> str:
        if self.process is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.process = subprocess.Popen(self.command, stderr=subprocess.DEVNULL, **pipes)
        print("go", file=self.process.stdin, flush=True)
        hung = threading.Timer(TIMEOUT, self.process.kill)
        hung.start()
        lines = iter(self.process.stdout.readline, "")
        outcome = next((line for line in lines if line.startswith("outcome ")), "")
        hung.cancel()
        if outcome:
            return outcome.removeprefix("outcome ").strip()
        code, self.process = self.process.wait(), None
        return f"VIOLATION the process died with {code}, or hung and was killed"

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def fuzz(what: str, mutations: int, number: int, sealed: bool = True) -> tuple[Counter, dict]:
    """Outcomes by kind of mutation, and an example of each violation."""
    draw, found, violations = random.Random(number), Counter(), {}
    with tempfile.TemporaryDirectory(prefix="supmim_jax_fuzz_") as directory:
        root = Path(directory)
        make(root)
        target = root / "cache" if what == "cache" else root / "data" / NAME / "1.0.0"
        if not sealed:
            (root / "data" / NAME / "1.0.0" / source_module.CHECKSUMS).unlink()
        whole = root / "whole"
        shutil.copytree(target, whole)
        reader = Reader(root, what)
        assert reader() == RIGHT, "what is whole is not read"
        for i in range(mutations):
            files = sorted(path for path in target.iterdir() if path.is_file())
            kind = mutate(files, draw)
            outcome = reader()
            if outcome.startswith("VIOLATION"):
                violations.setdefault(outcome, f"mutation {i}: {kind}")
                outcome = "VIOLATION"
            found[kind, outcome] += 1
            shutil.rmtree(target)
            shutil.copytree(whole, target)
        reader.close()
    return found, violations


def table(found: Counter) -> str:
    kinds = sorted({kind for kind, _ in found})
    outcomes = sorted({outcome for _, outcome in found})
    rows = [["mutation", *outcomes]]
    rows += [[kind, *(str(found[kind, outcome]) for outcome in outcomes)] for kind in kinds]
    rows += [["all", *(str(sum(found[k, o] for k in kinds)) for o in outcomes)]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--what", choices=("arrayrecord", "cache"), default="arrayrecord")
    parser.add_argument("--mutations", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unsealed", action="store_true")
    parser.add_argument("--child", default="")
    given = parser.parse_args()
    if given.child:
        child(Path(given.child), given.what)
        return 0
    begin = time.monotonic()
    found, violations = fuzz(given.what, given.mutations, given.seed, not given.unsealed)
    print(f"{given.what}, seed {given.seed}:\n{table(found)}")
    for violation, example in violations.items():
        print(f"{violation}\n  {example}")
    print(f"{time.monotonic() - begin:.0f} s")
    return int(bool(violations))


if __name__ == "__main__":
    sys.exit(main())
