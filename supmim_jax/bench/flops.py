"""FLOPs of the real train step: counted in its compiled program, beside the arithmetic.

Nothing is allocated and no data are read, so a full-size step can be compiled on a laptop.
"""

import json
import time
from collections import Counter
from collections.abc import Callable

import jax
from absl import flags

from supmim_jax import config_file, hlo, program, sharding
from supmim_jax.bench import analytic
from supmim_jax.config import Config, SetupError
from supmim_jax.configdict import from_configdict

# A part is named by a function that its matmuls were traced in; the first that fits. The head is
# a linear layer that the objective calls itself.
PARTS = (
    ("PatchCodes.encode", "tokenizer"),
    ("VQGAN.encode", "tokenizer"),
    ("Decoder.__call__", "decoder"),
    ("CMAE.contrastive", "contrastive"),
    ("ViT.embed", "patch embedding"),
    ("ViT.encode", "encoder"),
    ("Linear.__call__", "head"),
)
DIRECTIONS = ("forward", "backward", "recomputed")
GIGA = 1e9


def measure(cfg: Config, mesh: jax.sharding.Mesh) -> dict:
    """Compiles the train step of `cfg` and counts.

    FLOPs are of the whole step on all devices, bytes of one device: what the compiler allots to
    arguments, results and temporary values (its own `peak_memory` leaves the last out on CPU).
    CPU keeps float32 copies of what other devices hold in bfloat16.
    """
    prog = program.build(cfg, mesh)
    start = time.perf_counter()
    compiled = prog.step.lower(prog.state, prog.batch, prog.frozen).compile()
    seconds = time.perf_counter() - start
    return counted(cfg, mesh, compiled, seconds)


def counted(cfg: Config, mesh: jax.sharding.Mesh, compiled, seconds: float) -> dict:
    """What `measure` gives, of a step that was compiled in so many seconds."""
    counts = hlo.count(compiled.as_text())
    scopes = {scope: flops * mesh.size for scope, flops in counts.by_scope.items()}
    parts = analytic.train(cfg)
    model = cfg.batch_size * sum(work.model for work in parts.values())
    recomputed = cfg.batch_size * sum(work.recomputed for work in parts.values())
    total = counts.flops * mesh.size
    memory = compiled.memory_analysis()
    return {
        "objective": cfg.objective.name,
        "batch_size": cfg.batch_size,
        "remat": cfg.model.remat,
        "devices": f"{mesh.size} {mesh.devices.flat[0].device_kind}",
        "hlo_flops_per_step": total,
        "hlo_gf_per_image": total / cfg.batch_size / GIGA,
        "analytic_gf_per_image": model / cfg.batch_size / GIGA,
        "recomputed_gf_per_image": recomputed / cfg.batch_size / GIGA,
        "ratio": total / model,
        "ratio_with_recomputed": total / (model + recomputed),
        "parts": compare(cfg, scopes, parts),
        "scopes": scopes,
        "bytes_per_device": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        "compile_seconds": seconds,
    }


def compare(cfg: Config, scopes: dict[str, int], parts: dict[str, analytic.Work]) -> dict:
    """{part: {direction: [GF per image in the HLO, by arithmetic]}}, where either isn't 0."""
    found = Counter()
    for scope, flops in scopes.items():
        direction, path = scope.split(": ", 1)
        found[part_of(path), direction] += flops / cfg.batch_size
    expected = Counter(
        {
            (part, direction): flops
            for part, work in parts.items()
            for direction, flops in zip(DIRECTIONS, (work.forward, work.backward, work.recomputed))
            if flops
        }
    )
    table: dict = {}
    for part, direction in sorted(found.keys() | expected.keys()):
        pair = [found[part, direction] / GIGA, expected[part, direction] / GIGA]
        table.setdefault(part, {})[direction] = pair
    return table


def part_of(path: str) -> str:
    """The part of the model that the functions of a scope belong to."""
    functions = path.split("/")
    return next((part for function, part in PARTS if function in functions), "other")


def report(result: dict) -> str:
    """The result as a table for people."""
    total = result["hlo_gf_per_image"]
    lines = [f"{'GF per image':28}{'HLO':>10}{'analytic':>10}{'ratio':>9}{'share':>9}"]
    for part, directions in result["parts"].items():
        for direction, (found, expected) in directions.items():
            ratio = f"{found / expected:.4f}" if expected else "-"
            lines.append(
                f"{part + ', ' + direction:28}{found:10.3f}{expected:10.3f}{ratio:>9}"
                f"{found / total:9.2%}"
            )
    model, recomputed = result["analytic_gf_per_image"], result["recomputed_gf_per_image"]
    lines.append(f"{'all':28}{total:10.3f}{model:10.3f}{result['ratio']:9.4f}")
    if recomputed:
        ratio = result["ratio_with_recomputed"]
        lines.append(
            f"{'all, with recomputed':28}{total:10.3f}{model + recomputed:10.3f}{ratio:9.4f}"
        )
    lines.append(
        f"{result['objective']}, batch {result['batch_size']}, remat {result['remat']}, "
        f"{result['devices']}: {result['hlo_flops_per_step'] / 1e12:.1f} TF per step; memory "
        f"{result['bytes_per_device'] / 2**30:.2f} GiB per device; compiled in "
        f"{result['compile_seconds']:.0f} s"
    )
    return "\n".join(lines)


def check(cfg: Config) -> None:
    """Raises SetupError where there is no arithmetic to compare counts with."""
    if cfg.objective.name not in analytic.OBJECTIVES:
        raise SetupError(
            f"--config is of objective {cfg.objective.name!r}; FLOPs are counted by hand, and "
            f"so comparable, for {' and '.join(analytic.OBJECTIVES)} only."
        )


def command() -> Callable[[], None]:
    """Defines the flags of this bench; what it returns prints a table and the result as JSON."""
    config = config_file.define("Experiment: configs/<name>.py")
    scopes = flags.DEFINE_bool("scopes", False, "Also list every scope with matmuls, in GF.")
    flags.mark_flag_as_required("config")

    def run() -> None:
        cfg = from_configdict(config.value)
        check(cfg)
        result = measure(cfg, sharding.make_mesh(cfg.mesh))
        print(report(result))
        by_scope = result.pop("scopes")
        if scopes.value:
            for scope, flops in by_scope.items():
                print(f"{flops / cfg.batch_size / GIGA:10.3f}  {scope}")
        print(json.dumps(result))

    return run
