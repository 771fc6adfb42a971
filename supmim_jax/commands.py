"""How the commands start and how they fail."""

import sys
from collections.abc import Callable

import jax
from absl import app, flags, logging

from supmim_jax.config import SetupError
from supmim_jax.metrics import Diverged

EXIT_SETUP = 2  # the config, data, workdir or checkpoint must be changed first
EXIT_DIVERGED = 3  # training met NaN or infinity

# What absl, ml_collections and a config file raise for a wrong flag, key or value.
MISTAKES = (flags.Error, SetupError, OSError, LookupError, AttributeError, TypeError, ValueError)


def start(run: Callable[[], None]) -> None:
    """Parses the flags and runs; what the user can fix is a paragraph on stderr, no traceback."""

    def main(argv: list[str]) -> None:
        if len(argv) > 1:
            fail(f"Unknown argument {argv[1]!r}; flags begin with --.", EXIT_SETUP)
        logging.set_verbosity(logging.ERROR)
        try:
            run()
        except SetupError as error:
            fail(str(error), EXIT_SETUP)
        except Diverged as error:
            fail(str(error), EXIT_DIVERGED)

    app.run(main, flags_parser=parse)


def parse(argv: list[str]) -> list[str]:
    """absl's flags; a mistake in one (also in --config.<key>) is a paragraph too."""
    try:
        return flags.FLAGS(argv)
    except MISTAKES as error:
        return fail(f"{error} (in the command line)", EXIT_SETUP)


def join() -> None:
    """Joins the other processes of this job; TPU VM or Slurm tell which they are.

    Raises:
      SetupError: neither does.
    """
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise SetupError(f"--distributed found no TPU VM or Slurm job: {error}") from None


def fail(message: str, code: int):
    print(f"\nerror: {message}", file=sys.stderr)
    sys.exit(code)
