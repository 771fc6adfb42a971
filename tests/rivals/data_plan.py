"""What the bench of the input pipeline is to measure, and the run that it measures it on."""

import contextlib
import dataclasses
from collections.abc import Iterator

from rivals import photographs
from supmim_jax import sharding
from supmim_jax.batch import Batch
from supmim_jax.config import Config, DataConfig, MeshConfig, SupervisedConfig
from supmim_jax.data.loader import Dataset

SIZE = 224  # pixels of a training image


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure."""

    images: int = 512
    seed: int = 0
    augment: str = "none"
    resize: str = "linear"
    workers: int = 0
    threads: int = 2
    batch: int = 64
    rounds: int = 5
    batches: int = 80  # of the whole pipeline, after the warm-up
    rival: bool = True

    @property
    def share(self) -> int:
        """Batches of the whole pipeline in a round."""
        return max(1, self.batches // self.rounds)


def config(plan: Plan, directory: str, images: int) -> Config:
    """A supervised run on the photographs with as many steps as the longest measurement takes."""
    workers, batch = plan.workers, min(plan.batch, images)
    read = batch * (plan.batches + 8 * max(1, workers)) * 2
    data = DataConfig(
        name="photographs", data_dir=directory, train_examples=images,
        num_classes=photographs.CLASSES, image_size=SIZE, channels=3, crop="inception",
        augment=plan.augment, resize=plan.resize, eval_resize=256, eval_split="train",
        workers=workers, threads=plan.threads,
    )  # fmt: skip
    epochs = (read + batch) / images
    return Config(
        seed=plan.seed, batch_size=batch, epochs=epochs, data=data, objective=SupervisedConfig()
    )


@contextlib.contextmanager
def batches(cfg: Config, plan: Plan) -> Iterator[Iterator[Batch]]:
    """The training batches on this host's devices; workers start as they do in training."""
    stream = Dataset.open(cfg).train(sharding.make_mesh(MeshConfig()))
    with contextlib.closing(stream):
        yield stream
