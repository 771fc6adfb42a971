"""What a train step costs on a TPU slice that isn't here, by compiling it for the slice.

  python -m supmim_jax.rehearse --config configs/supmim_b14_imagenet1k.py --topology v5e:16x16 \
      --config.mesh.fsdp=16
"""

import json

import jax
from absl import flags
from etils import epath

from supmim_jax import cli, storage
from supmim_jax.config.configdict import from_configdict
from supmim_jax.rehearse import aot, estimate


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # libtpu compiles; this machine's devices stay free
    cfg, part = from_configdict(CONFIG.value), aot.parse(TOPOLOGY.value)
    if SWEEP.value:
        output = estimate.compare(cfg, part, SWEEP.value)
        lines = estimate.table(output), estimate.recommend(output), estimate.LOWER_BOUND
        print(*lines, sep="\n\n")
    else:
        output = estimate.rehearse(cfg, part)
        as_row = ROW.value and "needed_gib" not in output
        print(estimate.row(output) if as_row else estimate.report(output))
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
