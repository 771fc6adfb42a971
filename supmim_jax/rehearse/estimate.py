"""From a compiled step to what it costs: memory, FLOPs, traffic, time, chip-hours."""

import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from supmim_jax import hlo, program
from supmim_jax.bench import analytic
from supmim_jax.config import Config
from supmim_jax.hlo import collectives, traffic
from supmim_jax.rehearse import network
from supmim_jax.rehearse.chips import Slice
from supmim_jax.rehearse.compiled import Compiled

GIB = 2**30
ROWS = 8  # a tile of TPU; with fewer rows XLA pads, and emulates all-gathers by all-reduces


def estimate(cfg: Config, mesh: Mesh, part: Slice, compiled: Compiled) -> dict:
    """What a step costs one chip, as JSON; seconds are lower bounds."""
    flops = analytic_flops(cfg, part)
    bytes_, roofline = roofline_seconds(compiled, part)
    kinds, ici = sent(cfg, mesh, part, compiled)
    bound = max(roofline, ici)
    memory = compiled.memory
    return {
        **subject(cfg, mesh, part),
        "fits": memory.total <= part.chip.hbm_gib * GIB,
        "hbm_gib": {
            "arguments": memory.arguments / GIB,
            "outputs": memory.outputs / GIB,
            "temporaries": memory.temporaries / GIB,
            "code": memory.code / GIB,
            "total": memory.total / GIB,
            "of": part.chip.hbm_gib,
        },
        "flops": compiled.flops,
        **flops,
        "flops_ratio": _ratio(compiled.flops, flops["model_flops"]),
        "flops_ratio_with_recomputed": _ratio(
            compiled.flops, flops["model_flops"] + flops["recomputed_flops"]
        ),
        "hbm_bytes": bytes_,
        "collectives": kinds,
        "roofline_seconds": roofline,
        "ici_seconds": ici,
        "step_seconds": bound,
        "mfu": flops["model_flops"] / bound / part.chip.flops,
        "steps": cfg.total_steps,
        "hours": cfg.total_steps * bound / 3600,
        "chip_hours": cfg.total_steps * bound / 3600 * part.chips,
        "compile_seconds": compiled.seconds,
    }


def subject(cfg: Config, mesh: Mesh, part: Slice) -> dict:
    """What was compiled."""
    return {
        "topology": part.name,
        "chips": part.chips,
        "objective": cfg.objective.name,
        "tokens": "cache" if cfg.tokens.cache else "step" if cfg.has_tokens else "none",
        "batch_size": cfg.batch_size,
        "mesh": dict(mesh.shape),
        "rows_per_shard": rows_per_shard(cfg, mesh),
        "remat": cfg.model.remat,
    }


def rows_per_shard(cfg: Config, mesh: Mesh) -> int:
    """Examples that a chip works on at once."""
    return cfg.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])


def analytic_flops(cfg: Config, part: Slice) -> dict[str, float]:
    """FLOPs per chip by arithmetic; 0 where it isn't done for the objective."""
    if cfg.objective.name not in analytic.OBJECTIVES:
        return {"model_flops": 0.0, "recomputed_flops": 0.0}
    parts = analytic.train(cfg).values()
    share = cfg.batch_size / part.chips
    return {
        "model_flops": share * sum(work.model for work in parts),
        "recomputed_flops": share * sum(work.recomputed for work in parts),
    }


def roofline_seconds(compiled: Compiled, part: Slice) -> tuple[int, float]:
    """HBM bytes of a step, and the least time that computing takes.

    Each instruction takes as long as its FLOPs or its bytes, whichever is longer; copies that run
    beside others take no time of their own, but all bytes together take theirs.
    """
    walk = hlo.FlopWalk(compiled.module)
    total, serial = 0, 0.0
    for item in traffic.traffic(compiled.module):
        instruction, computation, _, times = item.run
        times = 1 if times is None else times  # of random numbers, small
        total += item.bytes * times
        if not item.overlaps:
            flops = walk.instruction_cost(instruction, computation).total()
            longer = max(flops / part.chip.flops, item.bytes / part.chip.hbm_bytes)
            serial += times * longer
    return total, max(serial, total / part.chip.hbm_bytes)


def sent(cfg: Config, mesh: Mesh, part: Slice, compiled: Compiled) -> tuple[dict, float]:
    """Collectives of a step by kind, and the least time that they take one after the other."""
    found = collectives.find(compiled.module)
    coordinates = np.array([d.coords for d in mesh.devices.flat])
    parameters = parameter_bytes(cfg, mesh)
    total: dict[str, Counter] = {}
    for c in found:
        entry = total.setdefault(c.kind, Counter())
        entry["count"] += c.times
        entry["bytes"] += c.times * c.bytes
        entry["seconds"] += c.times * network.seconds(c, coordinates, part)
        for dtype in c.dtypes:
            entry[f"count_{dtype}"] += c.times
    kinds = {
        kind: {**total[kind], "of_parameters": total[kind]["bytes"] / parameters}
        for kind in collectives.KINDS
        if kind in total
    }
    return kinds, sum(entry["seconds"] for entry in kinds.values())


def parameter_bytes(cfg: Config, mesh: Mesh) -> int:
    """Of all trained parameters in bfloat16."""
    params = program.build(cfg, mesh).state.params
    return jnp.dtype(jnp.bfloat16).itemsize * sum(x.size for x in jax.tree.leaves(params))


def state_gib(cfg: Config, mesh: Mesh) -> float:
    """Of parameters and optimizer on one chip."""
    leaves = jax.tree.leaves(program.build(cfg, mesh).state)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves) / GIB


def _ratio(found: float, expected: float) -> float | None:
    return found / expected if expected else None
