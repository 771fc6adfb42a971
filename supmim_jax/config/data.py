"""The images: which data set, which crops, which augmentation."""

from dataclasses import dataclass
from typing import Literal

from supmim_jax.config.fields import INF, ConfigError, within


@dataclass(frozen=True)
class DataConfig:
    name: str = "fractals/tiny"  # a tfds name; `fractals` is built on first use
    data_dir: str = ""  # "" is tfds's own default (TFDS_DATA_DIR, else ~/tensorflow_datasets)
    train_split: str = "train"
    eval_split: str = "validation"
    train_examples: int = within(240, 1, INF)  # checked against the data set when it is opened
    num_classes: int = within(30, 2, INF)
    image_size: int = within(20, 1, INF)  # pixels, what the encoder sees
    channels: Literal[1, 3] = 1
    crop: Literal["inception", "random"] = "random"
    min_crop_area: float = within(0.05, 0.0, 1.0)  # inception crop: least share of the area
    flip: bool = True
    augment: Literal["none", "rand_augment", "three_augment"] = "none"
    augment_layers: int = within(2, 1, 8)  # rand_augment: operations per image
    augment_magnitude: float = within(15.0, 0.0, 30.0)  # rand_augment: 10 is AutoAugment's most
    color_jitter: float = within(0.3, 0.0, 1.0)  # three_augment: brightness, contrast, saturation
    eval_resize: int = within(24, 1, INF)  # pixels of the shorter side before the centre crop
    workers: int = within(0, 0, 256)  # decoding processes per host, a batch each; 0: threads
    threads: int = within(2, 1, 256)  # reading (and, with 0 workers, decoding) threads
    prefetch: int = within(4, 1, 1024)  # batches kept ready; at least one per thread

    def __post_init__(self):
        if self.eval_resize < self.image_size:
            raise ConfigError(
                f"eval_resize is {self.eval_resize}, but the centre crop needs at least "
                f"image_size = {self.image_size}."
            )
        if self.augment != "none" and self.channels != 3:
            raise ConfigError(
                f"augment is {self.augment!r}, which needs channels = 3, not {self.channels}."
            )
