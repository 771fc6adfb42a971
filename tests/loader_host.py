"""One of several hosts that read a run's data: writes the step and the ids of each batch it is fed.

python tests/loader_host.py '{"data_dir": ..., "out": ..., "first_step": 0, "hosts": 2, "host": 1,
                            "workers": 0, "epochs": 8}'
"""

import json
import sys
from pathlib import Path

from supmim_jax.config import Config, DataConfig
from supmim_jax.data.loader import Dataset

BATCH = 16


def config(data_dir: str, workers: int, epochs: int) -> Config:
    data = DataConfig(data_dir=data_dir, workers=workers)
    return Config(seed=3, batch_size=BATCH, epochs=epochs, data=data)


def main(asked: dict) -> None:
    cfg = config(asked["data_dir"], asked["workers"], asked["epochs"])
    share = BATCH // asked["hosts"]
    rows = range(asked["host"] * share, (asked["host"] + 1) * share)
    with Path(asked["out"]).open("w") as out:
        batches = Dataset.open(cfg).train_on_host(tuple(rows), asked["first_step"])
        for step, arrays in enumerate(batches, asked["first_step"]):
            out.write(json.dumps([step, *arrays["id"].tolist()]) + "\n")
            out.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
