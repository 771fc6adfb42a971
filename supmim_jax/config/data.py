"""The images: which data set, which crops, which augmentation."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from supmim_jax.config.fields import INF, path_field, within
from supmim_jax.errors import ConfigError

IGNORED = -1  # the class of a pixel that doesn't count, once the others are 0, 1, ...


@dataclass(frozen=True)
class MasksConfig:
    """The class of each pixel, in a feature that is an image of the same size."""

    field: str = ""  # the data set's feature; "": there are none
    num_classes: int = within(31, 2, INF)
    ignore: int = within(-1, -1, INF)  # value that doesn't count; -1: there is none
    offset: int = within(0, -(2**15), 2**15)  # added to the other values to make 0, 1, ...
    # Of images that EXIF turns, which pixels the masks are of: those in the file, or those a viewer
    # shows. A mask that EXIF turns itself is of those that a viewer shows.
    drawn_on: Literal["stored", "shown"] = "stored"


@dataclass(frozen=True)
class ContrastiveCropConfig:
    """Crops around what the image shows (arXiv 2202.03278), for data.crop = "contrastive"."""

    # heat_map: where the encoder's features are; the whole image until they are first asked.
    # centre: a fixed box of half the height and width (the paper's SimCCrop).
    boxes: Literal["heat_map", "centre"] = "heat_map"
    alpha: float = within(0.6, 1e-3, INF)  # centres are Beta(alpha, alpha) in the box; paper: 0.6
    threshold: float = within(0.1, 0.0, 0.99)  # of the heat map, scaled to [0, 1]; paper: 0.1
    every_epochs: float = within(20.0, 1e-6, INF)  # between passes; paper: 20 of 100


@dataclass(frozen=True)
class DataConfig:
    name: str = "fractals/tiny"  # a tfds name; `fractals` is built on first use
    data_dir: str = path_field()  # "" is tfds's: TFDS_DATA_DIR, else ~/tensorflow_datasets
    train_split: str = "train"
    eval_split: str = "validation"
    train_examples: int = within(240, 1, INF)  # checked against the data set when it is opened
    num_classes: int = within(30, 2, INF)
    label_field: str = "label"  # the data set's feature that is the class
    masks: MasksConfig = MasksConfig()  # only segmentation and the report read them
    image_size: int = within(20, 1, 2**14)  # pixels, what the encoder sees
    channels: Literal[1, 3] = 1
    background: tuple[int, ...] = within((255, 255, 255), 0, 255)  # behind transparency: RGB
    # White, in images of more than 8 bits a channel (65535; 4095 of 12-bit data) or of floats (1);
    # 0: such images are refused, as no file says it.
    max_value: float = within(0.0, 0.0, INF)
    # inception: area uniform, aspect log-uniform, as torchvision and timm draw them; inception_tf:
    # as tf.image.sample_distorted_bounding_box does, with more small crops; see transforms.py
    crop: Literal["inception", "inception_tf", "random", "contrastive"] = "random"
    contrastive_crop: ContrastiveCropConfig = ContrastiveCropConfig()
    # all but random crops: least share of the area
    min_crop_area: float = within(0.05, 0.0, 1.0)
    # linear: TensorFlow's default, a third of area's cost, not as smooth; see transforms.resize
    resize: Literal["area", "linear"] = "area"
    flip: bool = True
    # Repeated augmentation (arXiv 1902.05509): each image comes so often in a row, cropped and
    # coloured anew, and an epoch, as long as ever, has a share of the images.
    repeats: int = within(1, 1, 16)
    # rand_augment: AugReg's; timm_rand_augment: rand-m9-mstd0.5-inc1; see augment.py
    augment: Literal[
        "none", "rand_augment", "timm_rand_augment", "three_augment", "color_jitter"
    ] = "none"
    augment_layers: int = within(2, 1, 8)  # of both: operations per image
    # Of both; 10 is AutoAugment's most, and timm's, which takes 9. AugReg takes 15.
    augment_magnitude: float = within(15.0, 0.0, 30.0)
    color_jitter: float = within(0.3, 0.0, 1.0)  # brightness, contrast, saturation
    erasing: float = within(0.0, 0.0, 1.0)  # probability of random erasing, after all else
    eval_resize: int = within(24, 1, 2**14)  # pixels of the shorter side before the centre crop
    # Broken records that training may replace by others, as a share of those read (in the first
    # epoch: of the data set); above it the run stops.
    max_broken: float = within(0.001, 0.0, 1.0)
    workers: int = within(0, 0, 256)  # decoding processes per host, a batch each; 0: threads
    threads: int = within(2, 1, 256)  # reading (and, with 0 workers, decoding) threads
    prefetch: int = within(4, 1, 1024)  # batches kept ready; at least one per thread

    def __post_init__(self):
        if len(self.background) != 3:
            raise ConfigError(
                f"background is {self.background}; it must be red, green and blue, 0 to 255 each."
            )
        if self.eval_resize < self.image_size:
            raise ConfigError(
                f"eval_resize is {self.eval_resize}, but the centre crop needs at least "
                f"image_size = {self.image_size}."
            )
        if self.augment != "none" and self.channels != 3:
            raise ConfigError(
                f"augment is {self.augment!r}, which needs channels = 3, not {self.channels}."
            )

        if self.augment == "timm_rand_augment" and self.augment_magnitude > 10:
            raise ConfigError(
                f"augment_magnitude is {self.augment_magnitude}, but timm_rand_augment cuts it at "
                f"10: take 9, as in rand-m9-mstd0.5-inc1, or augment = 'rand_augment'."
            )

    @property
    def moves_pixels(self) -> bool:
        """Whether some operations of the augmentation move pixels."""
        return self.augment in ("rand_augment", "timm_rand_augment")

    @property
    def learns_boxes(self) -> bool:
        """Whether crops follow boxes that the encoder finds while it learns."""
        return self.crop == "contrastive" and self.contrastive_crop.boxes == "heat_map"


@dataclass(frozen=True)
class ProbeDataConfig:
    """The data to probe with; what is "", 0 or, of workers, -1 is as in the run."""

    name: str = ""
    data_dir: str = path_field()
    train_split: str = ""
    eval_split: str = ""
    num_classes: int = within(0, 0, INF)
    label_field: str = ""
    masks: MasksConfig = MasksConfig()  # the run's, if its field is ""
    eval_resize: int = within(0, 0, 2**14)
    max_value: float = within(0.0, 0.0, INF)
    workers: int = within(-1, -1, 256)
    threads: int = within(0, 0, 256)

    def over(self, run: DataConfig) -> DataConfig:
        """The run's data section with these in it; what the encoder sees stays the run's."""
        as_in_run = vars(ProbeDataConfig())
        given = {name: value for name, value in vars(self).items() if value != as_in_run[name]}
        if not self.masks.field:
            given.pop("masks", None)
        return dataclasses.replace(run, **given)
