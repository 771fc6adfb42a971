"""Segmentation of ADE20K's objects: a linear and a convolutional head on frozen tokens.

  python -m supmim_jax.probe --config configs/probes/segmentation_ade20k.py --checkpoint runs/b14

Hardware: one GPU, 16 GB of host memory (tokens of ViT-B/14); not run by us. First
`python -m supmim_jax.data.prepare --name scene_parse150`. What tfds prepares are the masks of the
instance challenge, whose red channel has 100 categories of objects and 0 elsewhere: its mIoU is not
that of the 150 classes of scene parsing. For those, name a data set with their masks and
num_classes=150.
"""

from supmim_jax import config as c


def experiment() -> c.ProbeConfig:
    data = c.ProbeDataConfig(
        name="scene_parse150",
        train_split="train",
        eval_split="test",
        masks=c.MasksConfig(field="annotation", num_classes=100, ignore=0, offset=-1),
    )
    training = c.HeadTrainingConfig(steps=12_640)  # 20 epochs; our choice
    segmentation = c.SegmentationConfig(max_examples=20_210, training=training)  # all
    evaluations = c.EvalConfig(which=("segmentation",), segmentation=segmentation)
    return c.ProbeConfig(data=data, eval=evaluations)
