"""Fine-tunes the ViT-B/14 of supmim_b14_imagenet1k on ADE20K's objects, 448 px, 32 x 32 patches.

  python -m supmim_jax.train --config configs/finetune_segmentation_ade20k.py --workdir runs/ade \
      --config.init.checkpoint=<workdir of the run to start from>

Hardware: one GPU with 40 GB or more, a TPU slice; with `:debug` after the file name, any machine.
The classes are the 100 of the instance challenge (see probes/segmentation_ade20k.py). Every value
is our choice; not measured.
"""

from configs import supmim_b14_imagenet1k
from supmim_jax import config as c


def experiment() -> c.Config:
    start = supmim_b14_imagenet1k.experiment()
    return c.changed(
        start,
        batch_size=64,
        epochs=64,
        data=c.DataConfig(
            name="scene_parse150",
            eval_split="test",
            train_examples=20_210,
            masks=c.MasksConfig(field="annotation", num_classes=100, ignore=0, offset=-1),
            image_size=448,
            eval_resize=448,
            channels=3,
            crop="inception",
            min_crop_area=0.25,
            resize="linear",
            augment="three_augment",
            workers=start.data.workers,
        ),
        model={"drop_path": 0.1, "position_grid": 16},
        objective=c.SegmentationObjectiveConfig(head="conv"),
        init=c.InitConfig(checkpoint="runs/supmim_b14_imagenet1k"),
        optim=c.OptimConfig(lr=1e-4, weight_decay=0.05, warmup_epochs=5, layer_decay=0.75),
        eval=c.EvalConfig(batch_size=64, which=("miou",)),
    )
