"""What a train step costs on a TPU slice that isn't here, by compiling it for the slice.

  python -m supmim_jax.rehearse --config configs/supmim_b14_imagenet1k.py --topology v5e:16x16 \
      --config.mesh.fsdp=16

It prints memory, time and chip-hours; with --sweep it compares meshes, and says which to choose.
Seconds are lower bounds. Computing is bounded by a roofline over every instruction, traffic between
chips by how long a collective keeps its links busy.
"""

import json
from collections import Counter

import jax
import numpy as np
from absl import flags
from etils import epath
from jax.sharding import Mesh

from supmim_jax import cli, sharding, storage
from supmim_jax.config import Config, MeshConfig, changed
from supmim_jax.config.configdict import from_configdict
from supmim_jax.errors import ConfigError, SetupError
from supmim_jax.rehearse import aot, flops, hlo
from supmim_jax.rehearse.aot import Compiled, Slice

GIB = 2**30
# Times that all-gather's traffic passes a chip: all-reduce is a reduce-scatter and an all-gather.
PASSES = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}


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
        "rows_per_shard": cfg.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"]),
        "remat": cfg.model.remat,
    }
    try:
        return result | estimate(cfg, mesh, part, aot.compile_step(cfg, mesh))
    except aot.TooLarge as error:
        needed, available = error.args
        return result | {"fits": False, "needed_gib": needed, "available_gib": available}


def estimate(cfg: Config, mesh: Mesh, part: Slice, compiled: Compiled) -> dict:
    """What a step costs one chip; FLOPs by arithmetic are 0 where the objective has none."""
    work, share = flops.total(cfg), cfg.batch_size / part.chips
    model, recomputed = share * work.model, share * work.recomputed
    counted = compiled.entry.flops
    moved, roofline = roofline_seconds(compiled, part)
    kinds = sent(compiled, mesh, part)
    ici = sum(entry["seconds"] for entry in kinds.values())
    bound = max(roofline, ici)
    gib = {name: size / GIB for name, size in compiled.memory.items()}
    gib["total"] = sum(gib.values())
    hours = cfg.total_steps * bound / 3600
    return {
        "fits": gib["total"] <= part.chip.hbm_gib,
        "hbm_gib": gib | {"of": part.chip.hbm_gib},
        "flops": counted,
        "model_flops": model,
        "recomputed_flops": recomputed,
        "flops_ratio": counted / model if model else None,
        "flops_ratio_with_recomputed": counted / (model + recomputed) if model else None,
        "hbm_bytes": moved,
        "collectives": kinds,
        "roofline_seconds": roofline,
        "ici_seconds": ici,
        "step_seconds": bound,
        "mfu": model / bound / part.chip.flops,
        "steps": cfg.total_steps,
        "hours": hours,
        "chip_hours": hours * part.chips,
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
            computing = hlo.flops(instruction) / part.chip.flops
            serial += times * max(computing, moved / part.chip.hbm_bytes)
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
    if collective.kind in PASSES:
        spanned = [d for d in range(len(part.shape)) if len(set(members[:, d])) > 1]
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


# --- comparing meshes

ROWS = 8  # a tile of TPU; with fewer rows XLA pads, and emulates all-gathers by all-reduces
TENSOR = (1, 2, 4)  # it did not pay for a ViT-B; beyond, heads and links are too few


def compare(cfg: Config, part: Slice, limit: int) -> list[dict]:
    """Several meshes and policies, the fastest that fits first; a line for each as it is done."""
    results = []
    for candidate in candidates(cfg, part)[:limit]:
        try:
            results.append(rehearse(candidate, part))
        except ConfigError as error:  # a width that fsdp or tensor doesn't divide
            print(f"left out: {error}", flush=True)
        else:
            print(row(results[-1]), flush=True)
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
        rows = cfg.batch_size / (shards * cfg.optim.accumulate)
        for fsdp in (n for n in range(1, shards + 1) if shards % n == 0):
            if rows % ROWS or cfg.model.heads % tensor or cfg.model.width % fsdp:
                continue
            mesh = MeshConfig(data=shards // fsdp, fsdp=fsdp, tensor=tensor)
            for remat in ("names", "full"):
                found.append(changed(cfg, mesh=mesh, model={"remat": remat}))
    return sorted(
        found,
        key=lambda c: (c.model.remat == "full", c.mesh.tensor, abs(c.mesh.data - c.mesh.fsdp)),
    )


def recommend(results: list[dict]) -> str:
    """The fastest that fits, and why; of those within 2 % of it the one with most HBM to spare."""
    fitting = [result for result in results if result["fits"]]
    if not fitting:
        return "Nothing that was tried fits: take more chips, or optim.accumulate."
    fastest = min(result["step_seconds"] for result in fitting)
    close = [result for result in fitting if result["step_seconds"] <= 1.02 * fastest]
    best = min(close, key=lambda result: (result["hbm_gib"]["total"], result["ici_seconds"]))
    mesh = ", ".join(f"mesh.{axis}={size}" for axis, size in best["mesh"].items())
    return (
        f"Recommended: {mesh}, model.remat={best['remat']!r}: {best['step_seconds'] * 1e3:.1f} ms "
        f"at least, within 2 % of the fastest ({fastest * 1e3:.1f} ms), and of those the least HBM "
        f"({best['hbm_gib']['total']:.2f} GiB)."
    )


# --- what is printed

LOWER_BOUND = (
    "Seconds, hours and MFU assume that nothing takes longer than its FLOPs or bytes and that\n"
    "traffic between chips is hidden entirely: no run will be faster."
)
LESS_MEMORY = (
    "What takes less memory, the cheapest in time first: model.remat='names', a larger mesh.fsdp,\n"
    "a larger optim.accumulate, model.remat='full', more chips."
)


def report(result: dict) -> str:
    """One rehearsal, as a block of lines."""
    lines = [
        f"{result['topology']}, {result['chips']} chips: {mesh_of(result)}",
        f"{result['objective']}, batch {result['batch_size']} ({result['rows_per_shard']} per "
        f"shard), remat {result['remat']}, tokens: {result['tokens']}",
    ]
    if "needed_gib" in result:
        return "\n".join([*lines, row(result), LESS_MEMORY])
    memory, ratios = result["hbm_gib"], " (no arithmetic for this objective)"
    if result["flops_ratio"] is not None:
        ratios = (
            f", {result['flops_ratio']:.4f} of the model's {result['model_flops'] / 1e12:.3f} T by "
            f"arithmetic, {result['flops_ratio_with_recomputed']:.4f} with what is recomputed"
        )
    lines += [
        f"{'fits' if result['fits'] else 'DOES NOT FIT'}: {memory['total']:.2f} GiB of "
        f"{memory['of']} per chip (arguments {memory['arguments']:.2f}, outputs beside them "
        f"{memory['outputs']:.2f}, temporaries {memory['temporaries']:.2f}, code "
        f"{memory['code']:.2f})",
        *[LESS_MEMORY] * (not result["fits"]),
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
    ]
    return "\n".join(lines)


def mesh_of(result: dict) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items())


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
    """A row of a Markdown table with COLUMNS; a line where the compiler refused."""
    if "needed_gib" in result:
        return (
            f"DOES NOT FIT: {mesh_of(result)}, remat {result['remat']}: the compiler needs "
            f"{result['needed_gib']} GiB of {result['available_gib']} per chip"
        )
    return f"| {' | '.join(cell(result) for cell in COLUMNS.values())} |"


def table(results: list[dict]) -> str:
    """A Markdown table; rehearsals that the compiler refused come after it."""
    rows = [row(result) for result in sorted(results, key=lambda r: "needed_gib" in r)]
    return "\n".join([f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *rows])


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # libtpu compiles; this machine's devices stay free
    cfg, part = from_configdict(CONFIG.value), aot.parse(TOPOLOGY.value)
    if SWEEP.value:
        output = compare(cfg, part, SWEEP.value)
        lines = table(output), recommend(output), LOWER_BOUND
        print(*lines, sep="\n\n")
    else:
        output = rehearse(cfg, part)
        as_row = ROW.value and "needed_gib" not in output
        print(row(output) if as_row else report(output))
    if JSON.value:
        epath.Path(JSON.value).write_text(json.dumps(output, indent=1))


if __name__ == "__main__":
    CONFIG = cli.define("Experiment: configs/<name>.py")
    TOPOLOGY = flags.DEFINE_string("topology", None, "Chip and shape of the slice: v5e:16x16")
    SWEEP = flags.DEFINE_integer("sweep", 0, "Compare this many meshes and remat policies.", 0)
    ROW = flags.DEFINE_bool("row", False, "Print the row of a Markdown table instead.")
    JSON = storage.define("json", None, "Also write the result to this file.", searched=False)
    flags.mark_flags_as_required(["config", "topology"])
    cli.start(main)
