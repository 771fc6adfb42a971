"""Measures: python -m supmim_jax.bench step|flops; with a checkout also boxes|data|knn|tokens.

`step` gives the train step's speed on this machine, its share of the matmul peak, its memory and a
profile; `flops` counts its arithmetic. `boxes` judges ContrastiveCrop's boxes by masks, `data`
compares the input pipeline with tf.data, `knn` the exact search with faiss, and `tokens` tells what
a token cache costs; they are in tests/rivals of a checkout. --help behind a name lists its flags.

`step` times steps in rounds, on one random batch that stays on the devices; with --data also as the
run's own input pipeline feeds them. The profile (jax.profiler, read without TensorFlow) says where
a step's time goes. It names operations as the compiled program does, whose text has the
jax.named_scope of each.
"""

import contextlib
import functools
import importlib
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from supmim_jax import cli, sharding, storage
from supmim_jax.batch import Batch
from supmim_jax.config import Config, changed
from supmim_jax.config.configdict import from_configdict
from supmim_jax.data.loader import Dataset
from supmim_jax.errors import SetupError
from supmim_jax.rehearse import aot, flops, hlo
from supmim_jax.rehearse.hlo import Instruction
from supmim_jax.train_step import TrainStep

WITH_CHECKOUT = ("boxes", "data", "knn", "tokens")
CHECKOUT = Path(__file__).resolve().parents[1]


def main() -> None:
    name = sys.argv.pop(1) if len(sys.argv) > 1 else "--help"
    benches = {"flops": flops, "step": sys.modules[__name__]}
    if name in WITH_CHECKOUT and rivals_of_checkout():
        benches[name] = importlib.import_module(f"rivals.{name}")
    if bench := benches.get(name):
        run = bench.command()
        flags.adopt_module_key_flags(bench)  # --help lists those of the main module
    else:

        def run() -> None:
            if name != "--help":
                raise SetupError(
                    f"There is no bench {name!r} here; known are {', '.join(benches)}, and with a "
                    f"checkout of the repository {', '.join(WITH_CHECKOUT)}."
                )
            print(__doc__)

    cli.start(run)


def rivals_of_checkout() -> bool:
    """Whether tests/rivals of the checkout that this package is part of can be imported now."""
    tests = CHECKOUT / "tests"
    if not (tests / "rivals").is_dir():
        return False
    if str(tests) not in sys.path:
        sys.path.append(str(tests))
    return True


# --- the train step

OURS = "supmim_jax"
WARM_UP = 2  # steps before the first round
REPEATS = 5  # of each matmul; the fastest counts
PACKAGES = ("jax", "jaxlib", "flax", "optax")


def command() -> Callable[[], None]:
    """Defines the flags of `step`; what it returns prints a table and the result as JSON."""
    config = cli.define("Experiment: configs/<name>.py")
    number, boolean = flags.DEFINE_integer, flags.DEFINE_bool
    given = {
        "rounds": number("rounds", 10, "Rounds; their median counts.", lower_bound=1),
        "steps": number("steps", 5, "Steps of a round.", lower_bound=1),
        "rival": boolean("rival", False, "By turns with PyTorch's step; tokens from a cache."),
        "compile_rival": boolean("compile_rival", True, "PyTorch's by torch.compile."),
        "where": boolean("where", True, "Profile a round: shares of time by part."),
        "data": boolean("data", False, "Also feed it the config's data: time waited for them."),
    }
    path = storage.define("json", "", "Also write the result to this file.", searched=False)
    flags.mark_flag_as_required("config")

    def run() -> None:
        asked = {name: flag.value for name, flag in given.items()}
        if asked["rival"]:  # it needs room on the same GPU
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        result = measure(from_configdict(config.value), **asked)
        print(report(result))
        print(json.dumps(result))
        if path.value:
            Path(path.value).write_text(json.dumps(result, indent=1) + "\n")

    return run


def measure(
    cfg: Config,
    *,
    rounds: int,
    steps: int,
    rival: bool = False,
    compile_rival: bool = True,
    where: bool = False,
    data: bool = False,
) -> dict:
    """All results as a dict that JSON can hold; `report` says what they mean.

    The options are the command's flags, which --help explains.

    Raises:
      SetupError: the objective has no arithmetic, PyTorch or data are asked for and missing, or
        both are asked for.
    """
    flops.check(cfg)
    if rival and data:
        raise SetupError("--rival and --data take the time of each other: measure one at a time.")
    if rival and cfg.has_tokens and not cfg.tokens.cache:
        # Both sides are given random ids, as from a cache: none is read.
        cfg = changed(cfg, tokens={"cache": "random"})
    mesh = sharding.run_mesh(cfg)
    device = mesh.devices.flat[0]
    if rival:
        if not rivals_of_checkout():
            raise SetupError("--rival needs a checkout of the repository: PyTorch's step is in it.")
        from rivals import torch_rival

        sizes = torch_rival.shapes(cfg, torch_rival.device(mesh), compile_rival)
    prog = TrainStep.build(cfg, mesh)
    begin = time.perf_counter()
    lowered = prog.step.lower(prog.state, prog.batch, prog.frozen)
    traced = time.perf_counter()
    compiled = lowered.compile()
    result = {
        "objective": cfg.objective.name,
        "batch_size": cfg.batch_size,
        "dtype": cfg.model.dtype,
        "remat": cfg.model.remat,
        "tokens": ("given" if cfg.tokens.cache else "in the step") if cfg.has_tokens else "none",
        "devices": f"{mesh.size} {device.device_kind}",
        "threads": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "trace_s": traced - begin,
        "compile_s": time.perf_counter() - traced,
        "compilation_cache": bool(jax.config.jax_compilation_cache_dir),
        "counts": counts(cfg, mesh, compiled),
    }
    ours = Ours(cfg, prog, compiled)
    if stats := device.memory_stats():
        result["memory"] = {"bytes": stats["peak_bytes_in_use"], "by": "the device"}
    else:
        allotted = aot.memory(compiled)
        total = sum(allotted.values()) - allotted["code"]
        result["memory"] = {"bytes": total, "by": "the compiler"}
    runners = {OURS: ours.run}
    if rival:
        parameters = {name: sizes_of(tree) for name, tree in prog.state.params.items()}
        with torch_rival.Rival(sizes, parameters) as theirs:
            for how in theirs.about["ways"]:
                runners[how] = functools.partial(theirs.run, how)
            turns = by_turns(runners, rounds, steps)
            result["rival"] = theirs.about | {"times": torch_rival.compared(turns)}
    else:
        turns = by_turns(runners, rounds, steps)
    wall = [turn.wall for turn in turns[OURS]]
    median = float(np.median(wall))
    result["step"] = {
        "median_s": median,
        "min_s": min(wall),
        "max_s": max(wall),
        "images_per_s": cfg.batch_size / median,
        "cpu_s": float(np.median([turn.cpu for turn in turns[OURS]])),
        "rounds": rounds,
        "steps": steps,
    }
    result["peak"] = matmul_peak(cfg, device)
    rate = result["counts"]["model_flops"] / median / mesh.size
    result["mfu"] = rate / max(result["peak"].values())
    if data:
        result["data"] = fed_by_pipeline(cfg, mesh, ours, rounds * steps)
    if where:
        result["where"] = shares(lambda: ours.run(steps), compiled.as_text())
    return result


def counts(cfg: Config, mesh: jax.sharding.Mesh, compiled) -> dict:
    """FLOPs of a step by arithmetic and, where the program can be counted, of the program."""
    found = {"model_flops": cfg.batch_size * flops.total(cfg).model}
    try:
        counted = flops.counted(cfg, mesh, compiled)
    except hlo.UnknownCost as error:
        return found | {"uncounted": str(error)}
    return found | {"hlo_flops": counted["hlo_flops_per_step"], "ratio": counted["ratio"]}


def sizes_of(tree) -> int:
    """How many numbers the arrays of a tree have."""
    return sum(x.size for x in jax.tree.leaves(tree))


# --- time


class Turn(NamedTuple):
    """Seconds of a step: of wall clock, and of CPU by all threads of its process."""

    wall: float
    cpu: float


class Ours:
    """A compiled step on random weights and one random batch that stays on the devices."""

    def __init__(self, cfg: Config, prog: TrainStep, compiled: Callable):
        self.compiled = compiled
        self.state = prog.init(jax.random.key(cfg.seed))
        random = np.random.default_rng(cfg.seed)
        self.batch = random_batch(cfg, prog.batch, random)
        self.fixed = placed(lambda x: random.uniform(-1, 1, x.shape), prog.frozen)
        self.run(WARM_UP)

    def run(self, steps: int) -> Turn:
        """Of `steps` one after the other; the devices are done at the end."""
        begin, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.state, metrics = self.compiled(self.state, self.batch, self.fixed)
        jax.block_until_ready((self.state, metrics))
        return Turn((time.perf_counter() - begin) / steps, (time.process_time() - cpu) / steps)


def random_batch(cfg: Config, like: Batch, random: np.random.Generator) -> Batch:
    """A batch of noise, laid out like the abstract one."""
    highest = {jnp.uint8.dtype: 256, jnp.uint16.dtype: 1}
    if cfg.tokens.cache:
        highest[jnp.uint16.dtype] = cfg.objective.target.codes

    def draw(x):
        if x.dtype == jnp.float32:
            return np.ones(x.shape, np.float32)
        return random.integers(0, highest.get(x.dtype, cfg.data.num_classes), x.shape, x.dtype)

    return placed(draw, like)


def placed(draw: Callable, like):
    """What `draw` gives for each abstract array, on the devices."""
    return jax.tree.map(lambda x: jax.device_put(draw(x).astype(x.dtype), x.sharding), like)


def by_turns(
    runners: dict[str, Callable[[int], Turn]], rounds: int, steps: int
) -> dict[str, list[Turn]]:
    """What a step took in each round; in a round every runner has a turn of `steps`."""
    turns = {name: [] for name in runners}
    for _ in range(rounds):
        for name, run in runners.items():
            turns[name].append(run(steps))
    return turns


def fed_by_pipeline(
    cfg: Config, mesh: jax.sharding.Mesh, ours: Ours, steps: int
) -> dict[str, float]:
    """Seconds of a step as `train` feeds it, and of these the seconds that nothing was there.

    As in training the host is one step ahead of the devices, so what was made while they computed
    is not waited for. The first steps, which start threads and fill buffers, do not count.

    Raises:
      SetupError: the data are missing, or a run of this config has too few steps.
    """
    if cfg.total_steps < WARM_UP + steps:
        raise SetupError(
            f"--data takes {WARM_UP + steps} steps, and a run of this config has "
            f"{cfg.total_steps}: give fewer --rounds or --steps, or more config.epochs."
        )
    metrics = None
    with contextlib.closing(Dataset.open(cfg).train(mesh)) as batches:
        for step in range(WARM_UP + steps):
            if step == WARM_UP:
                jax.block_until_ready(metrics)
                begin, waited = time.perf_counter(), 0.0
            before = time.perf_counter()
            batch = next(batches)
            if step >= WARM_UP:
                waited += time.perf_counter() - before
            previous = metrics
            ours.state, metrics = ours.compiled(ours.state, batch, ours.fixed)
            jax.block_until_ready(previous)
        jax.block_until_ready((ours.state, metrics))
        seconds = time.perf_counter() - begin
    return {
        "step_s": seconds / steps,
        "wait_s": waited / steps,
        "wait_share": waited / seconds,
        "steps": steps,
    }


MATMUL = jax.jit(jnp.matmul)


def matmul_peak(cfg: Config, device: jax.Device) -> dict[str, float]:
    """FLOP/s of matmuls in the step's own dtype on one device, by shape "MxKxN".

    Squares, and the two of the MLP at the step's size. The step's rate is to be judged by the best.
    """
    model, cpu = cfg.model, device.platform == "cpu"
    rows = min(cfg.batch_size * (cfg.data.image_size // model.patch) ** 2, 1 << (12 if cpu else 18))
    shapes = [(n, n, n) for n in ((512, 1024, 2048) if cpu else (2048, 4096, 8192))]
    shapes += [(rows, model.width, model.mlp_dim), (rows, model.mlp_dim, model.width)]
    calls = 1 if cpu else 10  # to hide the time of starting one
    found = {}
    with jax.default_device(device):
        for m, k, n in shapes:
            x, y = (jnp.full(shape, 0.5, model.dtype) for shape in ((m, k), (k, n)))
            jax.block_until_ready(MATMUL(x, y))
            seconds = []
            for _ in range(REPEATS):
                begin = time.perf_counter()
                jax.block_until_ready([MATMUL(x, y) for _ in range(calls)])
                seconds.append(time.perf_counter() - begin)
            found[f"{m}x{k}x{n}"] = 2 * m * k * n * calls / min(seconds)
    return found


# --- where time goes

# What models, objectives and the train step say by jax.named_scope.
SCOPES = (
    *("tokenizer", "decoder", "contrastive", "patch_embedding", "encoder", "MLP", "attention"),
    *("masks", "mixing", "optimizer"),
)
LOSS_AND_HEAD = "head and losses"
UNNAMED = "copies and fills of the compiler"


def shares(run: Callable[[], None], text: str) -> dict[str, float]:
    """Share of the device's operation time by part, largest first; {} if the profile has none.

    Args:
      run: runs some steps to their end.
      text: `as_text()` of the compiled step.
    """
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        files = Path(directory).rglob("*.xplane.pb")
        profiles = [jax.profiler.ProfileData.from_file(str(path)) for path in files]
        spent = by_part(text, (pair for profile in profiles for pair in operations(profile)))
    total = sum(spent.values())
    return {name: time / total for name, time in spent.most_common()}


def operations(profile) -> Iterator[tuple[str, float]]:
    """Names in the program, and nanoseconds, of what ran of a module called step.

    CPU and GPU say so in the statistics of each event; what doesn't is left out.
    """
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                said = dict(event.stats)
                if "hlo_op" in said and "step" in str(said.get("hlo_module")):
                    yield said["hlo_op"], event.duration_ns


def by_part(text: str, operations) -> Counter:
    """Nanoseconds by part; of operations that the text doesn't have, under UNNAMED."""
    computations = hlo.parse(text).module.values()
    known = {name: x for part in computations for name, x in part.instructions.items()}
    spent = Counter()
    for name, nanoseconds in operations:
        instruction = known.get(name)
        # The time of a loop, call or conditional is that of what it runs.
        if instruction is None or instruction.opcode not in ("while", "call", "conditional"):
            spent[part_of(instruction)] += nanoseconds
    return spent


def part_of(instruction: Instruction | None) -> str:
    """The part of the step that an operation belongs to; of the encoder also which part of it."""
    if instruction is None or not instruction.op_name:
        return UNNAMED
    names = [name for name in re.findall(r"\w+", instruction.op_name) if name in SCOPES]
    if not names:
        return LOSS_AND_HEAD
    name = names[-1] if names[0] == "encoder" else names[0]
    return "encoder, between blocks" if name == "encoder" else name.replace("_", " ")


# --- what is printed

GIGA, MIB = 1e9, 2**20


def report(result: dict) -> str:
    """Lines of Markdown: what was measured, the tables, and what their numbers mean."""
    step, count, memory = result["step"], result["counts"], result["memory"]
    shape, peak = max(result["peak"].items(), key=lambda item: item[1])
    model = count["model_flops"] / result["batch_size"] / GIGA
    cached = ", from the compilation cache where it was there" * result["compilation_cache"]
    ratio = f"{count['ratio']:.4f}" if "ratio" in count else f"not counted: {count['uncounted']}"
    rows = {
        "images/s": f"{step['images_per_s']:.1f}",
        "step, ms": f"{1e3 * step['median_s']:.1f} ({1e3 * step['min_s']:.1f} to "
        f"{1e3 * step['max_s']:.1f}; {step['rounds']} rounds of {step['steps']})",
        "GF per image by arithmetic": f"{model:.3f}",
        "FLOPs of the program / arithmetic": ratio,
        "matmul peak here, GF/s": f"{peak / GIGA:.0f} (MxKxN {shape})",
        "MFU, of that peak": f"{result['mfu']:.1%}",
        "peak memory of a device, MiB": f"{memory['bytes'] / MIB:.0f} (says {memory['by']})",
        "tracing, s": f"{result['trace_s']:.1f}",
        "compiling, s": f"{result['compile_s']:.1f}{cached}",
    }
    if data := result.get("data"):
        rows["step fed by the input pipeline, ms"] = (
            f"{1e3 * data['step_s']:.1f} (mean of {data['steps']} steps in one go)"
        )
        rows["data wait"] = f"{data['wait_share']:.1%} of that, {1e3 * data['wait_s']:.2f} ms"
    lines = [
        f"{result['objective']}, batch {result['batch_size']}, {result['dtype']}, remat "
        f"{result['remat']}, tokens {result['tokens']}; {result['devices']}, {result['threads']} "
        f"CPU threads, load {result['load']:.1f}; jax {result['versions']['jax']}",
        "",
        *("| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())),
    ]
    if "rival" in result:
        from rivals import torch_rival

        lines += ["", *torch_rival.table(result)]
    if where := result.get("where"):
        lines += ["", "| part | share of operation time |", "|---|---|"]
        lines += [f"| {name} | {share:.1%} |" for name, share in where.items()]
        lines += ["", "Time is of all threads or streams together in a profile of one round."]
    elif "where" in result:
        lines += ["", "Where time goes: the profile of this device names no operations."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
