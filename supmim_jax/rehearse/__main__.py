"""What a train step costs on a TPU slice that isn't here, by compiling it for the slice.

  python -m supmim_jax.rehearse --config configs/supmim_b14_imagenet1k.py --topology v5e:16x16 \
      --config.mesh.fsdp=16
"""

import json

import jax
from absl import flags
from etils import epath

from supmim_jax import cli, sharding, storage
from supmim_jax.config import Config
from supmim_jax.config.configdict import from_configdict
from supmim_jax.errors import ConfigError, SetupError
from supmim_jax.rehearse import aot, estimate


def rehearse(cfg: Config, part: aot.Slice) -> dict:
    """Compiles one step for the slice; what it costs, or that it doesn't fit, as JSON.

    Raises:
      SetupError: libtpu, the slice, the mesh and the config don't fit together.
    """
    if cfg.mesh.slices > 1:
        raise SetupError(
            f"config.mesh.slices is {cfg.mesh.slices}: a rehearsal is of one slice. Set it to 1 "
            f"and config.batch_size to a slice's part; between slices go its gradients, too."
        )
    mesh = sharding.make_mesh(cfg.mesh, aot.devices(part))
    try:
        result = estimate.estimate(cfg, mesh, part, aot.compile_step(cfg, mesh))
    except aot.TooLarge as error:
        result = {
            **estimate.subject(cfg, mesh, part),
            "fits": False,
            "needed_gib": error.needed,
            "available_gib": error.available,
        }
    permutes = result.get("collectives", {}).get("collective-permute", {"count": 0})["count"]
    return {**result, "advice": estimate.advise(cfg, mesh, result["fits"], permutes)}


def compare(cfg: Config, part: aot.Slice, limit: int) -> list[dict]:
    """Several meshes and policies, the fastest that fits first; a line for each as it is done."""
    results = []
    for candidate in estimate.subset(estimate.candidates(cfg, part), limit):
        try:
            result = rehearse(candidate, part)
        except ConfigError as error:  # a width that fsdp or tensor doesn't divide
            print(f"left out: {error}", flush=True)
            continue
        results.append(result)
        print(
            estimate.refused(result) if "needed_gib" in result else estimate.row(result), flush=True
        )
    return sorted(results, key=lambda r: (not r["fits"], r.get("step_seconds", 0.0)))


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # libtpu compiles; this machine's devices stay free
    cfg, part = from_configdict(CONFIG.value), aot.parse(TOPOLOGY.value)
    if SWEEP.value:
        results = compare(cfg, part, SWEEP.value)
        print(
            estimate.table(results), estimate.recommend(results), estimate.LOWER_BOUND, sep="\n\n"
        )
        output = results
    else:
        output = rehearse(cfg, part)
        if ROW.value and "needed_gib" not in output:
            print(estimate.row(output))
        else:
            print(estimate.report(output))
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
