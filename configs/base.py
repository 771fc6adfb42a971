"""What the experiment files share; not an experiment itself.

`experiment()` of such a file returns a Config or, in probes/, a ProbeConfig, whose encoder, image
size and channels are those of the checkpoint. `:debug` behind the file's name shrinks the job.
"""

from supmim_jax import config as c

IMAGENET_1K = c.DataConfig(
    name="imagenet2012",
    train_examples=1_281_167,
    num_classes=1000,
    image_size=224,
    channels=3,
    # AugReg's medium2 (scenic, imagenet_augreg_vit_config.py): TensorFlow's inception crop, then
    # two operations of magnitude 15; with mixup 0.5. Ours: those that move pixels come first.
    crop="inception_tf",
    min_crop_area=0.05,
    resize="linear",  # for speed, in training and evaluation alike: our choice
    augment="rand_augment",
    augment_layers=2,
    augment_magnitude=15.0,
    eval_resize=256,
    workers=16,
    threads=16,
)
IMAGENET_1K_THREE_AUGMENT = c.changed(
    IMAGENET_1K,
    crop="inception",
    min_crop_area=0.08,
    augment="three_augment",
    color_jitter=0.3,
    repeats=3,
    eval_resize=224,  # DeiT-III's crop ratio of 1
)
IMAGENET_1K_CROPS = c.changed(  # MAE's
    IMAGENET_1K, crop="inception", min_crop_area=0.2, augment="none"
)
TINY_IMAGENET = c.changed(
    IMAGENET_1K_CROPS,
    name="tiny_imagenet",  # data.prepare --image_folder tiny-imagenet-200 --as tiny_imagenet
    train_examples=100_000,
    num_classes=200,
    image_size=64,
    eval_resize=64,
)
IMAGENET_21K = c.changed(
    IMAGENET_1K,
    name="imagenet21k",
    train_examples=14_197_122,  # less those that are held out: data.prepare tells how many
    num_classes=21_841,
)
# Of ViTConfig. Average pooling with fixed positions is in the manner of Beyer et al. (arXiv
# 2205.01580), with MAE's frequencies: our choice, AugReg and DeiT-III have a CLS token and
# learned positions.
AT_SCALE = {"positions": "sincos2d", "dtype": "bfloat16", "remat": "names"}
# Of DataConfig: rand-m9-mstd0.5-inc1.
TIMM_RAND_AUGMENT = {"augment": "timm_rand_augment", "augment_layers": 2, "augment_magnitude": 9.0}
MAE_DECODER = c.DecoderConfig(depth=8, width=512, mlp_dim=2048, heads=16)
MAE_OPTIM = c.OptimConfig(
    lr=1.5e-4,
    lr_batch=256,
    weight_decay=0.05,
    decay_on="matrices_and_tokens",
    b2=0.95,
    warmup_epochs=40,
    clip=0.0,
)
EVAL_AT_SCALE = c.EvalConfig(batch_size=2048)
KNN_SWEEP = c.KNNConfig(ks=(1, 5, 10, 20, 50, 100, 200))
EVAL_WITHOUT_LABELS = c.EvalConfig(batch_size=2048, which=("knn",))  # there is no head to ask
# The masked branch at scale. Mask ratio and form, the encoder's input, decoder, weight and target
# are our choices: the text of the paper that we have gives none of them. Mask embeddings through
# the encoder are what measured better on the built-in data (docs/results.md), at twice the
# encoder's cost; encoder_input=visible with mask_ratio=0.75 is the cheap form.
FRACTALS = c.DataConfig(  # the defaults of the schema are those of fractals/tiny
    name="fractals/tiny",
    masks=c.MasksConfig(field="segmentation", num_classes=31),  # 0 is the ground
)
SUPMIM = c.SupMIMConfig(
    mask_ratio=0.5,
    mask_form="random",
    encoder_input="masked",
    mim_weight=1.0,
    decoder=c.DecoderConfig(depth=2, width=512, mlp_dim=2048, heads=16),
    target=c.VQGANConfig(),  # MaskGIT's: 224 px in patches of 14 are 256 px in its tokens of 16
)


def probed(name: str, num_classes: int, eval_split: str, **fields) -> c.ProbeDataConfig:
    """The data of a probe: a data set with a split `train` and a class `label` per image."""
    fields = {"train_split": "train", "label_field": "label"} | fields
    return c.ProbeDataConfig(name=name, num_classes=num_classes, eval_split=eval_split, **fields)


def with_masked_branch(config: c.Config, supmim: c.SupMIMConfig) -> c.Config:
    """The SupMIM run that differs from a supervised one in nothing but the masked branch."""
    objective = c.changed(supmim, classification=config.objective.classification)
    return c.changed(config, objective=objective)


def fine_tuned(mae: c.Config, checkpoint: str) -> c.Config:
    """The supervised run that goes on from an MAE run, by the recipe of MAE's appendix A.1."""
    classification = c.ClassificationConfig(mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    return c.changed(
        mae,
        batch_size=1024,
        epochs=100,
        data={"crop": "inception", "min_crop_area": 0.08, "erasing": 0.25, **TIMM_RAND_AUGMENT},
        model={"drop_path": 0.1},
        objective=c.SupervisedConfig(classification=classification),
        init=c.InitConfig(checkpoint=checkpoint),
        optim=c.OptimConfig(
            lr=5e-4,
            lr_batch=256,
            final_lr=1e-6,
            weight_decay=0.05,
            warmup_epochs=5,
            layer_decay=0.65,
            clip=0.0,
        ),
        eval=EVAL_AT_SCALE,
    )
