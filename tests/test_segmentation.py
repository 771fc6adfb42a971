"""Fine-tuning on masks: crops of masks, the loss, and a run from a checkpoint to its scores."""

import dataclasses

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ON_ONE, ONE, make_batch, train_on
from flax import nnx
from test_masks import shapes_dir  # noqa: F401

from supmim_jax import encoder as encoder_module
from supmim_jax import probe, sharding
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import (
    IGNORED,
    Config,
    DataConfig,
    EvalConfig,
    InitConfig,
    MasksConfig,
    MeshConfig,
    OptimConfig,
    ProbeConfig,
    SegmentationObjectiveConfig,
    SupervisedConfig,
    ViTConfig,
    changed,
)
from supmim_jax.data import transforms
from supmim_jax.data.loader import Dataset
from supmim_jax.errors import ConfigError, SetupError
from supmim_jax.objectives.segmentation import Segmentation
from supmim_jax.train import train
from supmim_jax.train_step import TrainStep

pytestmark = pytest.mark.usefixtures("build_once")

FIGURES = MasksConfig(field="segmentation", num_classes=31)


@pytest.fixture
def masked(cfg, initial) -> Config:
    """A run on masks that starts from a checkpoint."""
    return changed(
        cfg,
        data={"masks": FIGURES, "eval_split": "validation[:70]"},
        objective=SegmentationObjectiveConfig(head="linear"),
        init=InitConfig(checkpoint=initial),
        eval=EvalConfig(batch_size=64, which=("miou",)),
    )


@pytest.mark.parametrize("size", [16, 90])
@pytest.mark.parametrize("crop", ["inception", "random"])
def test_masks_are_cropped_as_their_images(crop, size):
    """The image is its mask, so that both stay alike but for what is mixed along edges."""
    cfg = DataConfig(image_size=size, eval_resize=size, crop=crop, masks=MasksConfig(field="m"))
    image = np.zeros((60, 80), np.uint8)
    image[7:33, 11:52] = image[40:55, 60:75] = 30
    encoded = cv2.imencode(".png", image)[1].tobytes()
    make, found = transforms.MaskedTrainExample(cfg, 0), []
    for epoch in range(40):
        example = make((epoch, 3, {"image": encoded, "mask": encoded}))
        pixels, masks = example["image"][..., 0], example["masks"]
        assert masks.dtype == np.int32 and masks.shape == (size, size)
        assert set(np.unique(masks)) <= {0, 30}
        sure = (pixels == 0) | (pixels == 30)
        assert ((pixels == masks)[sure]).mean() > 0.97 and sure.mean() > 0.6
        found.append(masks)
    assert 0.1 < np.mean(np.array(found) > 0) < 0.4
    again = make((5, 3, {"image": encoded, "mask": encoded}))["masks"]
    assert (again == found[5]).all() and (found[5] != found[6]).any()
    plain = transforms.TrainExample(cfg, 0, 100)((5, 3, {"image": encoded, "label": 0}))["image"]
    assert (plain == make((5, 3, {"image": encoded, "mask": encoded}))["image"]).all()


def test_the_loss_is_that_of_pencil_and_paper():
    """Blocks that add nothing, 2x2 tokens, masks of 4x4 pixels of which some don't count."""
    cfg = Config(
        batch_size=2,
        data=DataConfig(image_size=4, eval_resize=4, masks=MasksConfig(field="m", num_classes=3)),
        model=ViTConfig(patch=2, width=8, depth=1, mlp_dim=8, heads=1),
        objective=SegmentationObjectiveConfig(head="linear"),
    )
    model = Segmentation(cfg, rngs=nnx.Rngs(0))
    blocks = model.encoder.transformer.blocks
    for layer in (blocks.out, blocks.fc2):
        layer.kernel[...] = jnp.zeros_like(layer.kernel[...])
    random = np.random.default_rng(0)
    masks = random.integers(0, 3, (2, 4, 4))
    masks[0, 1:3] = IGNORED
    batch = dataclasses.replace(make_batch(cfg), masks=jnp.asarray(masks, jnp.int32))
    loss, metrics = model.loss(batch, jax.random.key(0))

    w = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[1]))
    x = np.asarray(batch.views[0], np.float64)[..., 0] / 127.5 - 1
    patches = x.reshape(2, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(2, 4, 4)
    encoder, head = w["encoder"], w["segmenter"]["output"]
    t = patches @ encoder["patches"]["kernel"] + encoder["patches"]["bias"] + encoder["positions"]
    t = (t - t.mean(-1, keepdims=True)) / np.sqrt(t.var(-1, keepdims=True) + 1e-6)
    t = t * encoder["norm"]["scale"] + encoder["norm"]["bias"]
    logits = (t @ head["kernel"] + head["bias"]).reshape(2, 2, 2, 3)
    up = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])  # bilinear, pixels' centres
    logits = np.einsum("yi,xj,bijv->byxv", up, up, logits)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    counted = masks != IGNORED
    terms = [-log_p[b, y, x, masks[b, y, x]] for b, y, x in zip(*np.nonzero(counted))]
    assert float(loss) == pytest.approx(np.mean(terms), rel=1e-5)
    right = (logits.argmax(-1) == masks)[counted].mean()
    assert float(metrics["accuracy"]) == pytest.approx(right)


@pytest.mark.parametrize("head", [pytest.param("linear", marks=pytest.mark.slow), "conv"])
def test_the_loss_falls_and_the_mesh_does_not_matter(masked, head):
    cfg = changed(
        masked,
        epochs=10,
        objective=SegmentationObjectiveConfig(head=head),
        optim=OptimConfig(lr=3e-3, warmup_epochs=1, layer_decay=0.9),
        model={"drop_path": 0.0},
    )
    batch = next(Dataset.open(cfg).train(ON_ONE))
    one, eight = (
        [metrics["loss"] for metrics in train_on(cfg, mesh, [batch] * 20)[1]]
        for mesh in (ON_ONE, sharding.make_mesh(MeshConfig(data=2, fsdp=4)))
    )
    assert one[-1] < 0.6 * one[0]
    np.testing.assert_allclose(one, eight, rtol=2e-3)


def test_a_run_starts_from_a_checkpoint_and_probes_repeat_its_scores(masked, initial, tmp_path):
    built = TrainStep.build(masked, ON_ONE)
    assert set(built.state.params) == {"encoder", "segmenter"}
    interrupted = tmp_path / "masks"
    train(masked, interrupted, stop_at=5, devices=ONE)
    results = train(masked, interrupted, devices=ONE)
    whole = train(masked, tmp_path / "whole", devices=ONE)
    assert whole["miou"] == results["miou"] and 0 < results["miou"] < 100
    assert set(results) >= {"miou", "pixel_accuracy"} and "top1" not in results
    both = [probe.probe(Checkpoint.open(str(interrupted)), devices=d).results for d in (ONE, None)]
    for found in both:
        assert found.metrics["miou"] == pytest.approx(results["miou"], abs=0.01)
        assert len(found.details["miou"]["iou"]) == 31
    assert by_hand(masked, str(interrupted)) == pytest.approx(results["miou"], abs=1e-9)
    wanted = ProbeConfig(eval=EvalConfig(batch_size=64, which=("top1", "knn", "miou")))
    found = probe.probe(Checkpoint.open(str(interrupted)), wanted, devices=ONE).results.metrics
    assert set(found) == {"knn", "miou", "pixel_accuracy"}
    with pytest.raises(ConfigError, match="'miou', but objective 'supmim' trains no head"):
        probe.probe(Checkpoint.open(initial), wanted, devices=ONE)
    with pytest.raises(SetupError, match=r"config.data.masks.field: 'segmentation'; 'image'"):
        train(changed(masked, data={"masks": MasksConfig("image")}), interrupted, devices=ONE)


def by_hand(cfg: Config, workdir: str) -> float:
    """mIoU in per cent, from sets of pixels of the examples that are no padding."""
    encoder = encoder_module.restore(Checkpoint.open(workdir), ON_ONE)
    truth, found = [], []
    for batch in Dataset(cfg).masked(cfg.data.eval_split, ON_ONE):
        real = np.asarray(batch.weight) > 0
        truth.append(np.asarray(batch.masks)[real])
        found.append(np.asarray(encoder.features(batch.views[0]).masks)[real])
    truth, found = np.concatenate(truth), np.concatenate(found)
    assert len(truth) == 70
    overlaps = [
        ((truth == c) & (found == c)).sum() / ((truth == c) | (found == c)).sum()
        for c in np.union1d(truth, found)
    ]
    return 100 * float(np.mean(overlaps))


def test_the_encoder_of_the_first_step_is_the_checkpoints(masked, initial, tmp_path):
    still = changed(masked, optim=OptimConfig(lr=0.0))
    train(still, tmp_path / "still", stop_at=1, devices=ONE)
    params = TrainStep.build(masked, ON_ONE).state.params
    like = {"encoder": params["encoder"]}
    there = Checkpoint.open(initial).restore_params(like)
    here = Checkpoint.open(str(tmp_path / "still")).restore_params(like)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (there, here))))


def test_data_without_labels_of_images_can_be_trained_on(masked, shapes_dir, tmp_path):  # noqa: F811
    data = DataConfig(
        name="masked_shapes",
        data_dir=shapes_dir,
        train_examples=48,
        eval_split="test",
        label_field="none",
        masks=MasksConfig(field="annotation", num_classes=2, ignore=0, offset=-1),
    )
    optim = OptimConfig(lr=3e-3, warmup_epochs=1)
    cfg = changed(masked, data=data, epochs=10, optim=optim)
    found = train(cfg, tmp_path / "shapes", devices=ONE)
    assert found["miou"] > 60 and found["pixel_accuracy"] > 80


def test_what_masks_cannot_be_learned_with_is_refused(masked):
    colours = {"augment": "timm_rand_augment", "augment_magnitude": 9.0, "channels": 3}
    for changes, message in (
        ({"data": {"masks": MasksConfig()}}, "masks.field is empty, but objective"),
        ({"data": {"augment": "rand_augment", "channels": 3}}, "moves pixels away"),
        ({"data": colours}, "moves pixels away"),
        ({"objective": SupervisedConfig()}, "eval.which has 'miou', but objective 'supervised'"),
    ):
        with pytest.raises(ConfigError, match=message):
            changed(masked, **changes)
