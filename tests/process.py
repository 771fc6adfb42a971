"""One of several processes that train: python tests/process.py '{"config": {...}, ...}'.

As supmim_jax.train, but for `stop_at`, which no command has; prints the results.
"""

import json
import sys

from supmim_jax import cli, multihost
from supmim_jax.config.configdict import from_configdict
from supmim_jax.train import train


def main() -> None:
    asked = json.loads(sys.argv.pop())
    where = multihost.Place(asked["coordinator"], asked["processes"], asked["process"])

    def run() -> None:
        multihost.join(where, 60)
        cfg = from_configdict(asked["config"])
        cli.agree(cfg, {})
        print(json.dumps(train(cfg, asked["workdir"], asked["stop_at"])))

    cli.start(run)


if __name__ == "__main__":
    main()
