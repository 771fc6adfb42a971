#!/usr/bin/env python3
"""Prints the JobSet of a training on GKE; needs nothing but Python.

  python launch/gke/jobset.py tpu --name b14 --image IMAGE --accelerator tpu-v5-lite-podslice \\
      --topology 16x16 -- --config configs/supmim_b14_imagenet1k.py --workdir gs://bucket/b14 \\
      | kubectl apply -f -

What follows -- goes to supmim_jax.train. The image comes from launch/gke/Dockerfile.
"""

import argparse
import json
import math
import re
import string
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=("tpu", "gpu"))
    parser.add_argument("--name", required=True, help="of the JobSet; the run resumes by --workdir")
    parser.add_argument("--image", required=True)
    parser.add_argument("--accelerator", required=True, help="e.g. nvidia-h100-80gb")
    parser.add_argument("--topology", help="of a TPU slice, e.g. 16x16")
    parser.add_argument("--nodes", type=int, default=1, help="of GPUs")
    parser.add_argument("--chips", type=int, help="per host; default 4 TPU chips or 8 GPUs")
    parser.add_argument("--queue", default="multislice-queue", help="of Kueue; default xpk's")
    parser.add_argument("--cache", help="of compiled programs; default <workdir>/compiled")
    parser.add_argument("--restarts", type=int, default=20)
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given, training = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]

    # Pod names end up in host names: <name>-slice-job-0-<index>-<five letters>.
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", given.name):
        parser.error(f"--name {given.name!r} must be at most 40 of a-z, 0-9 and -, a letter first")
    for needed in ("--config", "--workdir"):
        if not any(re.match(rf"{needed}(=|$)", x) for x in training):
            parser.error(f"{needed} of supmim_jax.train is missing after --")
    if given.kind == "tpu" and not re.fullmatch(r"\d+(x\d+)+", given.topology or ""):
        parser.error("--topology of the TPU slice is missing, such as 4x4 or 2x2x2")

    chips = given.chips or {"tpu": 4, "gpu": 8}[given.kind]
    hosts = given.nodes
    if given.kind == "tpu":
        total = math.prod(map(int, given.topology.split("x")))
        chips = min(chips, total)
        hosts, rest = divmod(total, chips)
        if rest:
            parser.error(f"--topology {given.topology} is not a number of hosts of {chips} chips")
    text = (Path(__file__).parent / f"{given.kind}.yaml").read_text()
    template = string.Template(text[text.index("apiVersion:") :])  # without its opening comment
    # JSON is YAML; Kubernetes would expand $(NAME), and takes $$ for $.
    arguments = json.dumps([x.replace("$", "$$") for x in training])
    cache = json.dumps((given.cache or compiled(training)).replace("$", "$$"))
    values = vars(given) | {"chips": chips, "hosts": hosts, "arguments": arguments, "cache": cache}
    print(template.substitute(values), end="")


def compiled(training: list[str]) -> str:
    """Where compiled programs are kept: in the run's directory, so that a restart finds them."""
    joined = [x.removeprefix("--workdir=") for x in training if x.startswith("--workdir=")]
    workdir = joined[-1] if joined else training[training.index("--workdir") + 1]
    return f"{workdir.rstrip('/')}/compiled"


if __name__ == "__main__":
    main()
