"""From a compiled step to what it costs and what to change: memory, time, chip-hours, meshes.

Seconds are lower bounds: of computing by a roofline over every instruction, and of traffic between
chips by the links that a collective keeps busy.
"""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from supmim_jax import train_step
from supmim_jax.config import Config, MeshConfig
from supmim_jax.rehearse import flops as flops_module
from supmim_jax.rehearse import hlo
from supmim_jax.rehearse.aot import Compiled, Slice
from supmim_jax.rehearse.hlo import Collective

# Times that all-gather's traffic passes a chip: all-reduce is a reduce-scatter and an all-gather.
PASSES = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}


def seconds(collective: Collective, coordinates: np.ndarray, part: Slice) -> float:
    """Least time of one execution, if nothing else uses the links and latency is nothing.

    Rings along every dimension that the group spans run at once, each in both directions where
    the dimension is a closed ring that belongs to the group. What is not a ring (all-to-all,
    permutations) takes the average number of hops over as many links.

    Args:
      collective: groups count devices as in `coordinates`.
      coordinates: of each device of the mesh in the slice, (devices, dimensions).
      part: the slice.
    """
    members = coordinates[collective.groups[0]]
    spanned = [d for d in range(len(part.shape)) if len(set(members[:, d])) > 1]
    if collective.kind in PASSES:
        closed = [part.wraps[d] and len(set(members[:, d])) == part.shape[d] for d in spanned]
        bandwidth = part.chip.link * sum(2 if ring else 1 for ring in closed)
        share = (collective.group_size - 1) / collective.group_size
        return PASSES[collective.kind] * collective.bytes * share / bandwidth
    hops = mean_hops(collective, coordinates, part)
    links = 2 * sum(size > 1 for size in part.shape)
    return collective.bytes * hops / (links * part.chip.link)


def mean_hops(collective: Collective, coordinates: np.ndarray, part: Slice) -> float:
    """Average distance of what a device sends; to itself it is 0."""
    if collective.kind == "collective-permute":
        at, to = (coordinates[collective.groups[:, i]] for i in (0, 1))
    else:
        members = coordinates[collective.groups[0]]
        at, to = members[:, None], members[None, :]
    distance = np.abs(at - to)[..., : len(part.shape)]
    shape = np.array(part.shape)
    distance = np.where(part.wraps, np.minimum(distance, shape - distance), distance)
    return float(distance.sum(-1).mean())


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
    if not flops_module.is_counted(cfg):
        return {"model_flops": 0.0, "recomputed_flops": 0.0}
    parts = flops_module.train(cfg).values()
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
    for item in hlo.traffic(compiled.module):
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
    found = hlo.find(compiled.module)
    coordinates = np.array([d.coords for d in mesh.devices.flat])
    parameters = parameter_bytes(cfg, mesh)
    total: dict[str, Counter] = {}
    for c in found:
        entry = total.setdefault(c.kind, Counter())
        entry["count"] += c.times
        entry["bytes"] += c.times * c.bytes
        entry["seconds"] += c.times * seconds(c, coordinates, part)
        for dtype in c.dtypes:
            entry[f"count_{dtype}"] += c.times
    kinds = {
        kind: {**total[kind], "of_parameters": total[kind]["bytes"] / parameters}
        for kind in hlo.KINDS
        if kind in total
    }
    return kinds, sum(entry["seconds"] for entry in kinds.values())


def parameter_bytes(cfg: Config, mesh: Mesh) -> int:
    """Of all trained parameters in bfloat16."""
    params = train_step.build(cfg, mesh).state.params
    return jnp.dtype(jnp.bfloat16).itemsize * sum(x.size for x in jax.tree.leaves(params))


def _ratio(found: float, expected: float) -> float | None:
    return found / expected if expected else None


TENSOR = (1, 2, 4)  # it did not pay for a ViT-B; beyond, heads and links are too few


def candidates(cfg: Config, part: Slice) -> list[Config]:
    """Configs worth compiling: every fsdp that divides, two policies.

    Left out are those with rows per shard that are no multiple of ROWS, which TPU handles badly,
    and those that don't divide heads or width.
    """
    found = []
    for tensor in TENSOR:
        for fsdp in _divisors(part.chips // tensor):
            data = part.chips // (tensor * fsdp)
            rows = cfg.batch_size / (data * fsdp * cfg.optim.accumulate)
            if rows % ROWS or cfg.model.heads % tensor or cfg.model.width % fsdp:
                continue
            mesh = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
            for remat in ("names", "full"):
                model = dataclasses.replace(cfg.model, remat=remat)
                found.append(dataclasses.replace(cfg, mesh=mesh, model=model))
    return found


def subset(configs: list[Config], limit: int) -> list[Config]:
    """At most `limit` of them: "names" before "full", no tensor axis before one, balanced meshes
    before extreme ones."""

    def order(cfg: Config) -> tuple:
        mesh = cfg.mesh
        return cfg.model.remat == "full", mesh.tensor, abs(mesh.data - mesh.fsdp)

    return sorted(configs, key=order)[:limit]


def recommend(results: list[dict]) -> str:
    """The fastest that fits, and why; of those within 2 % of it the one with most HBM to spare."""
    fitting = [result for result in results if result.get("fits")]
    if not fitting:
        return "Nothing that was tried fits: take more chips, or optim.accumulate."
    fastest = min(result["step_seconds"] for result in fitting)
    close = [result for result in fitting if result["step_seconds"] <= 1.02 * fastest]
    best = min(close, key=lambda result: (result["hbm_gib"]["total"], result["ici_seconds"]))
    mesh = best["mesh"]
    return (
        f"Recommended: mesh.data={mesh['data']}, mesh.fsdp={mesh['fsdp']}, "
        f"mesh.tensor={mesh['tensor']}, model.remat={best['remat']!r}: "
        f"{best['step_seconds'] * 1e3:.1f} ms at least, within 2 % of the fastest "
        f"({fastest * 1e3:.1f} ms), and of those the least HBM "
        f"({best['hbm_gib']['total']:.2f} GiB)."
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def advise(cfg: Config, mesh: Mesh, fits: bool, permutations: int = 0) -> list[str]:
    """Sentences, the most urgent first; `permutations` are the collective-permutes of a step."""
    sentences = []
    if not fits:
        sentences.append(
            f"What takes less memory, the cheapest in time first: {', '.join(smaller(cfg, mesh))}."
        )
    rows = rows_per_shard(cfg, mesh) // cfg.optim.accumulate
    if rows % ROWS:
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        sentences.append(
            f"A chip works on {rows} rows at once, not a multiple of {ROWS}: TPU pads them, and "
            f"XLA may emulate all-gathers by all-reduces. With {shards} shards take a batch_size "
            f"that is a multiple of {ROWS * shards * cfg.optim.accumulate}, or a smaller slice."
        )
    if permutations >= cfg.model.depth:
        fsdp, width = mesh.shape["fsdp"], cfg.model.width
        sentences.append(
            f"{permutations} permutations: mesh.fsdp={fsdp} leaves {width // fsdp} of a width "
            f"of {width} to a chip, which XLA pads for its reduce-scatters and then mends. Compare "
            f"other mesh.fsdp (--sweep)."
        )
    return sentences


def smaller(cfg: Config, mesh: Mesh) -> list[str]:
    """Changes of the config that reduce the memory of a chip."""
    fsdp, data = mesh.shape["fsdp"], mesh.shape["data"]
    parts = 2 * cfg.optim.accumulate
    changes = {
        # Attention's logits alone are computed again.
        "model.remat='names'": cfg.model.remat == "none",
        f"mesh.fsdp={fsdp * data} with mesh.data=1": data > 1,
        f"optim.accumulate={parts}": rows_per_shard(cfg, mesh) % (parts * ROWS) == 0,
        "model.remat='full'": cfg.model.remat != "full",
        "more chips": True,
    }
    return [change for change, helps in changes.items() if helps]


LOWER_BOUND = (
    "Seconds, hours and MFU assume that nothing takes longer than its FLOPs or bytes and that\n"
    "traffic between chips is hidden entirely: no run will be faster."
)


def report(result: dict) -> str:
    """One rehearsal, as a block of lines."""
    if "needed_gib" in result:
        return "\n".join([*head(result), refused(result), *result["advice"]])
    memory = result["hbm_gib"]
    lines = [
        *head(result),
        f"{'fits' if result['fits'] else 'DOES NOT FIT'}: {memory['total']:.2f} GiB of "
        f"{memory['of']} per chip (arguments {memory['arguments']:.2f}, outputs beside them "
        f"{memory['outputs']:.2f}, temporaries {memory['temporaries']:.2f}, code "
        f"{memory['code']:.2f})",
        f"FLOPs per chip: {result['flops'] / 1e12:.3f} T{ratios(result)}",
        f"HBM traffic per chip: {result['hbm_bytes'] / 1e9:.2f} GB",
        f"{'collectives per step':24}{'count':>7}{'MB':>9}{'/ bf16 params':>15}{'ms':>8}  dtypes",
    ]
    for kind, entry in result["collectives"].items():
        dtypes = ", ".join(k.removeprefix("count_") for k in entry if k.startswith("count_"))
        lines.append(
            f"{kind:24}{entry['count']:7}{entry['bytes'] / 1e6:9.1f}{entry['of_parameters']:15.3f}"
            f"{entry['seconds'] * 1e3:8.2f}  {dtypes}"
        )
    lines += [
        f"step at least {result['step_seconds'] * 1e3:.1f} ms: computing "
        f"{result['roofline_seconds'] * 1e3:.1f} ms (roofline), between chips "
        f"{result['ici_seconds'] * 1e3:.1f} ms; MFU at most {result['mfu']:.1%}",
        f"{result['steps']} steps: at least {result['hours']:.1f} h, "
        f"{result['chip_hours']:.0f} chip-hours",
        f"compiled in {result['compile_seconds']:.0f} s",
        LOWER_BOUND,
        *result["advice"],
    ]
    return "\n".join(lines)


def head(result: dict) -> list[str]:
    mesh = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    return [
        f"{result['topology']}, {result['chips']} chips: {mesh}",
        f"{result['objective']}, batch {result['batch_size']} ({result['rows_per_shard']} per "
        f"shard), remat {result['remat']}, tokens: {result['tokens']}",
    ]


def refused(result: dict) -> str:
    return (
        f"DOES NOT FIT: the compiler needs {result['needed_gib']} GiB of "
        f"{result['available_gib']} per chip"
    )


def ratios(result: dict) -> str:
    if result["flops_ratio"] is None:
        return " (no arithmetic for this objective)"
    return (
        f", {result['flops_ratio']:.4f} of the model's {result['model_flops'] / 1e12:.3f} T by "
        f"arithmetic, {result['flops_ratio_with_recomputed']:.4f} with what is recomputed"
    )


COLUMNS = {
    "chips": lambda r: r["topology"],
    "mesh": lambda r: "x".join(str(n) for n in r["mesh"].values()),
    "remat": lambda r: r["remat"],
    "tokens": lambda r: r["tokens"],
    "GiB": lambda r: f"{r['hbm_gib']['total']:.2f}",
    "FLOPs/model": lambda r: f"{r['flops_ratio_with_recomputed'] or 0:.4f}",
    "HBM GB": lambda r: f"{r['hbm_bytes'] / 1e9:.1f}",
    "gather": lambda r: _share(r, "all-gather"),
    "scatter": lambda r: _share(r, "reduce-scatter"),
    "reduce": lambda r: _share(r, "all-reduce"),
    "roofline ms": lambda r: f"{r['roofline_seconds'] * 1e3:.1f}",
    "ICI ms": lambda r: f"{r['ici_seconds'] * 1e3:.1f}",
    "MFU %": lambda r: f"{100 * r['mfu']:.1f}",
    "chip-hours": lambda r: f"{r['chip_hours']:.0f}",
    "compile s": lambda r: f"{r['compile_seconds']:.0f}",
}


def _share(result: dict, kind: str) -> str:
    entry = result["collectives"].get(kind)
    return f"{entry['of_parameters']:.3f}" if entry else "0"


def row(result: dict) -> str:
    """A row of a Markdown table with COLUMNS."""
    return f"| {' | '.join(cell(result) for cell in COLUMNS.values())} |"


def table(results: list[dict]) -> str:
    """A Markdown table; rehearsals that don't fit come after it."""
    fitting = [result for result in results if "needed_gib" not in result]
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *map(row, fitting)]
    for result in results:
        if "needed_gib" in result:
            lines.append(f"{' '.join(head(result))}: {refused(result)}")
    return "\n".join(lines)
