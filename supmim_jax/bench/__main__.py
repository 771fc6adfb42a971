"""Measures: python -m supmim_jax.bench data|flops|knn|tokens; --help lists a bench's flags."""

import sys

from supmim_jax import commands
from supmim_jax.bench import data, flops, knn, tokens

BENCHES = {
    "data": data.command,
    "flops": flops.command,
    "knn": knn.command,
    "tokens": tokens.command,
}


def main() -> None:
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in BENCHES:
        known = ", ".join(BENCHES)
        commands.fail(f"There is no bench {name!r}; known are {known}.", commands.EXIT_SETUP)
    commands.start(BENCHES[name]())


if __name__ == "__main__":
    main()
