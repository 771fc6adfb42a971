"""Measures: python -m supmim_jax.bench step|flops; with a checkout also boxes|data|knn|tokens.

`boxes` judges ContrastiveCrop's boxes by masks, `data` compares the input pipeline with tf.data,
`knn` the exact search with faiss, and `tokens` tells what a token cache costs; they are in
tests/rivals of a checkout. --help behind a name lists its flags.
"""

import importlib
import sys

from absl import flags

from supmim_jax import cli, multihost
from supmim_jax.bench import rivals_of_checkout, step
from supmim_jax.rehearse import flops

BENCHES = {"flops": flops, "step": step}
WITH_CHECKOUT = ("boxes", "data", "knn", "tokens")


def main() -> None:
    name = sys.argv.pop(1) if len(sys.argv) > 1 else "--help"
    if name == "--help":
        print(__doc__)
        return
    if name in WITH_CHECKOUT and rivals_of_checkout():
        bench = importlib.import_module(f"rivals.{name}")
    elif name in BENCHES:
        bench = BENCHES[name]
    else:
        known = ", ".join((*BENCHES, *WITH_CHECKOUT))
        missing = f" {', '.join(WITH_CHECKOUT)} need a checkout of the repository."
        cli.fail(
            f"There is no bench {name!r} here; known are {known}.{missing}", multihost.EXIT_SETUP
        )
    run = bench.command()
    flags.adopt_module_key_flags(bench)  # --help lists those of the main module
    cli.start(run)


if __name__ == "__main__":
    main()
