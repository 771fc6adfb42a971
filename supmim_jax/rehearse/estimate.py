"""From a compiled step to what it costs and what to change: memory, time, chip-hours, meshes.

Seconds are lower bounds: of computing by a roofline over every instruction, and of traffic between
chips by the links that a collective keeps busy.
"""

import dataclasses
from collections import Counter

import numpy as np
from jax.sharding import Mesh

from supmim_jax import sharding
from supmim_jax.config import Config, MeshConfig
from supmim_jax.errors import ConfigError, SetupError
from supmim_jax.rehearse import aot, flops, hlo
from supmim_jax.rehearse.aot import Compiled, Slice

# Times that all-gather's traffic passes a chip: all-reduce is a reduce-scatter and an all-gather.
PASSES = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}


def seconds(collective: hlo.Collective, coordinates: np.ndarray, part: Slice) -> float:
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
    if collective.kind == "collective-permute":
        at, to = (coordinates[collective.groups[:, i]] for i in (0, 1))
    else:  # from each to each; to itself it is 0
        at, to = members[:, None], members[None, :]
    distance, shape = np.abs(at - to)[..., : len(part.shape)], np.array(part.shape)
    distance = np.where(part.wraps, np.minimum(distance, shape - distance), distance)
    links = 2 * sum(size > 1 for size in part.shape)
    return collective.bytes * distance.sum(-1).mean() / (links * part.chip.link)


GIB = 2**30
ROWS = 8  # a tile of TPU; with fewer rows XLA pads, and emulates all-gathers by all-reduces


def rehearse(cfg: Config, part: Slice) -> dict:
    """Compiles one step for the slice; what it costs, or that it doesn't fit, as JSON.

    Raises:
      SetupError: libtpu, the slice, the mesh and the config don't fit together.
    """
    if cfg.mesh.slices > 1:
        raise SetupError(
            f"config.mesh.slices is {cfg.mesh.slices}: a rehearsal is of one slice. Set it to 1 "
            f"and config.batch_size to a slice's part; between slices go its gradients, too."
        )
    mesh = sharding.run_mesh(cfg, aot.devices(part))
    result = {
        "topology": part.name,
        "chips": part.chips,
        "objective": cfg.objective.name,
        "tokens": "cache" if cfg.tokens.cache else "step" if cfg.has_tokens else "none",
        "batch_size": cfg.batch_size,
        "mesh": dict(mesh.shape),
        "rows_per_shard": rows_per_shard(cfg, mesh),
        "remat": cfg.model.remat,
    }
    try:
        result |= estimate(cfg, mesh, part, aot.compile_step(cfg, mesh))
    except aot.TooLarge as error:
        needed, available = error.args
        result |= {"fits": False, "needed_gib": needed, "available_gib": available}
    permutes = result.get("collectives", {}).get("collective-permute", {"count": 0})["count"]
    return result | {"advice": advise(cfg, mesh, result["fits"], permutes)}


def rows_per_shard(cfg: Config, mesh: Mesh) -> int:
    """Examples that a chip works on at once."""
    return cfg.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])


def estimate(cfg: Config, mesh: Mesh, part: Slice, compiled: Compiled) -> dict:
    """What a step costs one chip; seconds are lower bounds.

    FLOPs by arithmetic are 0 where it isn't done for the objective.
    """
    work = flops.train(cfg).values() if flops.is_counted(cfg) else ()
    share = cfg.batch_size / part.chips
    model, recomputed = (share * sum(getattr(w, x) for w in work) for x in ("model", "recomputed"))
    counted = compiled.entry.flops.total()
    bytes_, roofline = roofline_seconds(compiled, part)
    kinds = sent(compiled, mesh, part)
    ici = sum(entry["seconds"] for entry in kinds.values())
    bound = max(roofline, ici)
    gib = {name: size / GIB for name, size in compiled.memory.items()}
    total = sum(compiled.memory.values()) / GIB
    return {
        "fits": total <= part.chip.hbm_gib,
        "hbm_gib": {**gib, "total": total, "of": part.chip.hbm_gib},
        "flops": counted,
        "model_flops": model,
        "recomputed_flops": recomputed,
        "flops_ratio": counted / model if model else None,
        "flops_ratio_with_recomputed": counted / (model + recomputed) if model else None,
        "hbm_bytes": bytes_,
        "collectives": kinds,
        "roofline_seconds": roofline,
        "ici_seconds": ici,
        "step_seconds": bound,
        "mfu": model / bound / part.chip.flops,
        "steps": cfg.total_steps,
        "hours": cfg.total_steps * bound / 3600,
        "chip_hours": cfg.total_steps * bound / 3600 * part.chips,
        "compile_seconds": compiled.seconds,
    }


def roofline_seconds(compiled: Compiled, part: Slice) -> tuple[int, float]:
    """HBM bytes of a step, and the least time that computing takes.

    Each instruction takes as long as its FLOPs or its bytes, whichever is longer; copies that run
    beside others take no time of their own, but all bytes together take theirs.
    """
    total, serial = 0, 0.0
    for instruction, _, times in hlo.runs(compiled.entry):
        times = 1 if times is None else times  # of random numbers, small
        moved = hlo.traffic(instruction)
        total += moved * times
        if not instruction.opcode.endswith("start"):
            work = hlo.flops(instruction).total()
            serial += times * max(work / part.chip.flops, moved / part.chip.hbm_bytes)
    return total, max(serial, total / part.chip.hbm_bytes)


def sent(compiled: Compiled, mesh: Mesh, part: Slice) -> dict[str, dict]:
    """Collectives of a step by kind; seconds if they run one after the other."""
    coordinates = np.array([d.coords for d in mesh.devices.flat])
    total = {kind: Counter() for kind in hlo.KINDS}
    for c in hlo.collectives(compiled.entry):
        total[c.kind]["count"] += c.times
        total[c.kind]["bytes"] += c.times * c.bytes
        total[c.kind]["seconds"] += c.times * seconds(c, coordinates, part)
        for dtype in c.dtypes:
            total[c.kind][f"count_{dtype}"] += c.times
    bfloat16 = 2 * compiled.parameters
    return {
        kind: {**entry, "of_parameters": entry["bytes"] / bfloat16}
        for kind, entry in total.items()
        if entry
    }


TENSOR = (1, 2, 4)  # it did not pay for a ViT-B; beyond, heads and links are too few


def compare(cfg: Config, part: Slice, limit: int) -> list[dict]:
    """Several meshes and policies, the fastest that fits first; a line for each as it is done."""
    results = []
    for candidate in candidates(cfg, part)[:limit]:
        try:
            result = rehearse(candidate, part)
        except ConfigError as error:  # a width that fsdp or tensor doesn't divide
            print(f"left out: {error}", flush=True)
            continue
        results.append(result)
        print(refused(result) if "needed_gib" in result else row(result), flush=True)
    return sorted(results, key=lambda r: (not r["fits"], r.get("step_seconds", 0.0)))


def candidates(cfg: Config, part: Slice) -> list[Config]:
    """Configs worth compiling, the most promising first: every fsdp that divides, two policies.

    Left out are those with rows per shard that are no multiple of ROWS, which TPU handles badly,
    and those that don't divide heads or width. "names" comes before "full", no tensor axis before
    one, balanced meshes before extreme ones.
    """
    found = []
    for tensor in TENSOR:
        shards = part.chips // tensor
        for fsdp in (n for n in range(1, shards + 1) if shards % n == 0):
            rows = cfg.batch_size / (shards * cfg.optim.accumulate)
            if rows % ROWS or cfg.model.heads % tensor or cfg.model.width % fsdp:
                continue
            mesh = MeshConfig(data=shards // fsdp, fsdp=fsdp, tensor=tensor)
            for remat in ("names", "full"):
                model = dataclasses.replace(cfg.model, remat=remat)
                found.append(dataclasses.replace(cfg, mesh=mesh, model=model))
    return sorted(
        found,
        key=lambda c: (c.model.remat == "full", c.mesh.tensor, abs(c.mesh.data - c.mesh.fsdp)),
    )


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


def advise(cfg: Config, mesh: Mesh, fits: bool, permutations: int = 0) -> list[str]:
    """Sentences, the most urgent first; `permutations` are the collective-permutes of a step."""
    sentences = []
    data, fsdp, width = mesh.shape["data"], mesh.shape["fsdp"], cfg.model.width
    parts, rows = cfg.optim.accumulate, rows_per_shard(cfg, mesh)
    if not fits:
        changes = {
            "model.remat='names'": cfg.model.remat == "none",  # repeats attention's logits alone
            f"mesh.fsdp={fsdp * data} with mesh.data=1": data > 1,
            f"optim.accumulate={2 * parts}": rows % (2 * parts * ROWS) == 0,
            "model.remat='full'": cfg.model.remat != "full",
            "more chips": True,
        }
        helping = ", ".join(change for change, helps in changes.items() if helps)
        sentences.append(f"What takes less memory, the cheapest in time first: {helping}.")
    if rows // parts % ROWS:
        sentences.append(
            f"A chip works on {rows // parts} rows at once, not a multiple of {ROWS}: TPU pads "
            f"them, and XLA may emulate all-gathers by all-reduces. With {data * fsdp} shards take "
            f"a batch_size that is a multiple of {ROWS * data * fsdp * parts}, or a smaller slice."
        )
    if permutations >= cfg.model.depth:
        sentences.append(
            f"{permutations} permutations: mesh.fsdp={fsdp} leaves {width // fsdp} of a width "
            f"of {width} to a chip, which XLA pads for its reduce-scatters and then mends. Compare "
            f"other mesh.fsdp (--sweep)."
        )
    return sentences


LOWER_BOUND = (
    "Seconds, hours and MFU assume that nothing takes longer than its FLOPs or bytes and that\n"
    "traffic between chips is hidden entirely: no run will be faster."
)


def report(result: dict) -> str:
    """One rehearsal, as a block of lines."""
    if "needed_gib" in result:
        return "\n".join([*head(result), refused(result), *result["advice"]])
    memory, ratios = result["hbm_gib"], " (no arithmetic for this objective)"
    if result["flops_ratio"] is not None:
        ratios = (
            f", {result['flops_ratio']:.4f} of the model's {result['model_flops'] / 1e12:.3f} T by "
            f"arithmetic, {result['flops_ratio_with_recomputed']:.4f} with what is recomputed"
        )
    lines = [
        *head(result),
        f"{'fits' if result['fits'] else 'DOES NOT FIT'}: {memory['total']:.2f} GiB of "
        f"{memory['of']} per chip (arguments {memory['arguments']:.2f}, outputs beside them "
        f"{memory['outputs']:.2f}, temporaries {memory['temporaries']:.2f}, code "
        f"{memory['code']:.2f})",
        f"FLOPs per chip: {result['flops'] / 1e12:.3f} T{ratios}",
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
