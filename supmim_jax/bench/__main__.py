"""Measures: python -m supmim_jax.bench boxes|data|flops|knn|step|tokens; --help lists flags."""

import sys

from absl import flags

from supmim_jax import cli, multihost
from supmim_jax.bench import boxes, data, knn, step, tokens
from supmim_jax.rehearse import flops as flops_

BENCHES = {
    "boxes": boxes,
    "data": data,
    "flops": flops_,
    "knn": knn,
    "step": step,
    "tokens": tokens,
}


def main() -> None:
    name = sys.argv.pop(1) if len(sys.argv) > 1 else "--help"
    if name == "--help":
        print(__doc__)
        return
    if name not in BENCHES:
        known = ", ".join(BENCHES)
        cli.fail(f"There is no bench {name!r}; known are {known}.", multihost.EXIT_SETUP)
    run = BENCHES[name].command()
    flags.adopt_module_key_flags(BENCHES[name])  # --help lists those of the main module
    cli.start(run)


if __name__ == "__main__":
    main()
