"""Times of a step on this process's devices, and what they are measured against."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from supmim_jax.batch import Batch
from supmim_jax.config import Config
from supmim_jax.train_step import Program

WARM_UP = 2  # steps before the first round
REPEATS = 5  # of each matmul; the fastest counts


class Turn(NamedTuple):
    """Seconds of a step: of wall clock, and of CPU by all threads of its process."""

    wall: float
    cpu: float


class Ours:
    """A compiled step on random weights and one random batch that stays on the devices."""

    def __init__(self, cfg: Config, prog: Program, compiled: Callable):
        self.compiled = compiled
        self.state = prog.init(jax.random.key(cfg.seed))
        random = np.random.default_rng(cfg.seed)
        self.batch = random_batch(cfg, prog.batch, random)
        self.fixed = placed(
            lambda x: random.uniform(-1, 1, x.shape).astype(np.float32), prog.frozen
        )
        self.run(WARM_UP)

    def run(self, steps: int) -> Turn:
        """Of `steps` one after the other; the devices are done at the end."""
        begin, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.state, metrics = self.compiled(self.state, self.batch, self.fixed)
        jax.block_until_ready((self.state, metrics))
        spent = time.perf_counter() - begin, time.process_time() - cpu
        return Turn(*(seconds / steps for seconds in spent))


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


def matmul_peak(cfg: Config, device: jax.Device) -> dict[str, float]:
    """FLOP/s of matmuls in the step's own dtype on one device, by shape "MxKxN".

    Squares, and the two of the MLP at the step's size. The step's rate is to be judged by the best.
    """
    model, cpu = cfg.model, device.platform == "cpu"
    rows = min(cfg.batch_size * (cfg.data.image_size // model.patch) ** 2, 1 << (12 if cpu else 18))
    shapes = [(n, n, n) for n in ((512, 1024, 2048) if cpu else (2048, 4096, 8192))]
    shapes += [(rows, model.width, model.mlp_dim), (rows, model.mlp_dim, model.width)]
    found = {}
    with jax.default_device(device):
        for m, k, n in shapes:
            x, y = (jnp.full(shape, 0.5, model.dtype) for shape in ((m, k), (k, n)))
            calls = 1 if cpu else 10  # to hide the time of starting one
            jax.block_until_ready(MATMUL(x, y))
            best = min(_seconds(x, y, calls) for _ in range(REPEATS))
            found[f"{m}x{k}x{n}"] = 2 * m * k * n / best
    return found


MATMUL = jax.jit(jnp.matmul)


def _seconds(x, y, calls: int) -> float:
    begin = time.perf_counter()
    jax.block_until_ready([MATMUL(x, y) for _ in range(calls)])
    return (time.perf_counter() - begin) / calls


def memory(compiled, device: jax.Device) -> dict:
    """Peak bytes of one device, and whether it or the compiler says so."""
    if stats := device.memory_stats():
        return {"bytes": stats["peak_bytes_in_use"], "by": "the device"}
    found = compiled.memory_analysis()
    total = found.argument_size_in_bytes + found.temp_size_in_bytes
    total += found.output_size_in_bytes - found.alias_size_in_bytes
    return {"bytes": total, "by": "the compiler"}
