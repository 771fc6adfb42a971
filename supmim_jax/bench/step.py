"""The train step on this machine: speed, share of its matmul peak, memory, where time goes."""

import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from absl import flags

from supmim_jax import cli, sharding, storage, train_step
from supmim_jax.bench import step_data, step_timing, step_where, torch_rival
from supmim_jax.bench.step_report import report
from supmim_jax.config import Config
from supmim_jax.config.configdict import from_configdict
from supmim_jax.errors import SetupError
from supmim_jax.rehearse import flops, hlo

OURS = "supmim_jax"
PACKAGES = ("jax", "jaxlib", "flax", "optax")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure."""

    rounds: int = 10
    steps: int = 5  # of a round
    rival: bool = False
    compile_rival: bool = True  # by torch.compile
    where: bool = True
    data: bool = False


def command() -> Callable[[], None]:
    """Defines the flags of this bench; what it returns prints a table and the result as JSON."""
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
        plan = Plan(**{name: flag.value for name, flag in given.items()})
        if plan.rival:  # it needs room on the same GPU
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        result = measure(from_configdict(config.value), plan)
        print(report(result))
        print(json.dumps(result))
        if path.value:
            Path(path.value).write_text(json.dumps(result, indent=1) + "\n")

    return run


def measure(cfg: Config, plan: Plan) -> dict:
    """All results as a dict that JSON can hold; `report` says what they mean.

    Raises:
      SetupError: of this objective there is no arithmetic, PyTorch or data are asked for and
        missing, or both are asked for.
    """
    flops.check(cfg)
    if plan.rival and plan.data:
        raise SetupError("--rival and --data take the time of each other: measure one at a time.")
    if plan.rival and cfg.has_tokens and not cfg.tokens.cache:
        # Both sides are given random ids, as from a cache: none is read.
        cfg = dataclasses.replace(cfg, tokens=dataclasses.replace(cfg.tokens, cache="random"))
    mesh = sharding.make_mesh(cfg.mesh)
    device = mesh.devices.flat[0]
    sizes = None
    if plan.rival:
        sizes = torch_rival.shapes(cfg, torch_rival.device(mesh), plan.compile_rival)
    prog = train_step.build(cfg, mesh)
    begin = time.perf_counter()
    lowered = prog.step.lower(prog.state, prog.batch, prog.frozen)
    traced = time.perf_counter()
    compiled = lowered.compile()
    result = about(cfg, mesh) | {
        "trace_s": traced - begin,
        "compile_s": time.perf_counter() - traced,
        "compilation_cache": bool(jax.config.jax_compilation_cache_dir),
        "counts": counts(cfg, mesh, compiled),
    }
    ours = step_timing.Ours(cfg, prog, compiled)
    result["memory"] = step_timing.memory(compiled, device)
    runners = {OURS: ours.run}
    if plan.rival:
        parameters = {name: sizes_of(tree) for name, tree in prog.state.params.items()}
        with torch_rival.Rival(sizes, parameters) as rival:
            for how in rival.about["ways"]:
                runners[how] = functools.partial(rival.run, how)
            turns = step_timing.by_turns(runners, plan.rounds, plan.steps)
            result["rival"] = rival.about | {"times": compared(turns)}
    else:
        turns = step_timing.by_turns(runners, plan.rounds, plan.steps)
    result["step"] = summed(turns[OURS], cfg.batch_size) | {
        "rounds": plan.rounds, "steps": plan.steps,
    }  # fmt: skip
    result["peak"] = step_timing.matmul_peak(cfg, device)
    rate = result["counts"]["model_flops"] / result["step"]["median_s"]
    result["mfu"] = rate / mesh.size / max(result["peak"].values())
    if plan.data:
        result["data"] = step_data.measure(cfg, mesh, ours, plan.rounds * plan.steps)
    if plan.where:
        result["where"] = step_where.shares(lambda: ours.run(plan.steps), compiled.as_text())
    return result


def about(cfg: Config, mesh: jax.sharding.Mesh) -> dict:
    """What is measured, and on what."""
    return {
        "objective": cfg.objective.name,
        "batch_size": cfg.batch_size,
        "dtype": cfg.model.dtype,
        "remat": cfg.model.remat,
        "tokens": ("given" if cfg.tokens.cache else "in the step") if cfg.has_tokens else "none",
        "devices": f"{mesh.size} {mesh.devices.flat[0].device_kind}",
        "threads": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def counts(cfg: Config, mesh: jax.sharding.Mesh, compiled) -> dict:
    """FLOPs of a step by arithmetic and, where the program can be counted, of the program."""
    work = flops.train(cfg).values()
    found = {"model_flops": cfg.batch_size * sum(part.model for part in work)}
    try:
        counted = flops.counted(cfg, mesh, compiled, 0.0)
    except hlo.UnknownCost as error:
        return found | {"uncounted": str(error)}
    total = {
        part: sum(pair[0] for pair in directions.values())
        for part, directions in counted["parts"].items()
    }
    return found | {
        "hlo_flops": counted["hlo_flops_per_step"],
        "ratio": counted["ratio"],
        "gf_per_image": total,
    }


def sizes_of(tree) -> int:
    """How many numbers the arrays of a tree have."""
    return sum(x.size for x in jax.tree.leaves(tree))


def summed(turns: list[step_timing.Turn], images: int) -> dict[str, float]:
    """Median, least and most of the rounds; CPU seconds are those of all threads."""
    wall = [turn.wall for turn in turns]
    median = float(np.median(wall))
    return {
        "median_s": median,
        "min_s": min(wall),
        "max_s": max(wall),
        "images_per_s": images / median,
        "cpu_s": float(np.median([turn.cpu for turn in turns])),
    }


def compared(turns: dict[str, list[step_timing.Turn]]) -> dict:
    """PyTorch's times each way, and their ratio to ours by round: above 1 ours is the faster."""
    found = {}
    for how, theirs in turns.items():
        if how != OURS:
            pairs = list(zip(theirs, turns[OURS], strict=True))
            found[how] = {
                "median_s": float(np.median([turn.wall for turn in theirs])),
                "cpu_s": float(np.median([turn.cpu for turn in theirs])),
                "ratio": spread([a.wall / b.wall for a, b in pairs]),
                "cpu_ratio": spread([a.cpu / b.cpu for a, b in pairs]),
            }
    return found


def spread(values: list[float]) -> list[float]:
    """[median, least, most]"""
    return [float(np.median(values)), min(values), max(values)]
