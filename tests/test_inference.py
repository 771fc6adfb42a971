"""An encoder in Python and by the embed command: what it gives is what evaluations see."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
import yaml
from conftest import ONE, python, save, save_initial
from etils import epath
from PIL import Image
from test_processes import ended, places, started

import supmim_jax
from supmim_jax import embed, encoder, export, sharding
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import (
    Config,
    DataConfig,
    MAEConfig,
    MeshConfig,
    SupervisedConfig,
    ViTConfig,
    changed,
)
from supmim_jax.data import loader
from supmim_jax.errors import SetupError
from supmim_jax.evals import features
from supmim_jax.inference import BrokenImage
from supmim_jax.storage import write_json
from supmim_jax.train import train
from supmim_jax.train_step import TrainStep
from supmim_jax.workdir import CLASS_NAMES

COLOUR = Config(
    data=DataConfig(channels=3, eval_resize=22),
    model=ViTConfig(width=32, depth=2, mlp_dim=64, heads=2),
    objective=SupervisedConfig(),
)
NAMES = [f"beast {i}" for i in range(COLOUR.data.num_classes)]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """The --workdir of a classifier of colour images, whose head is not zero; it is only read."""
    state = TrainStep.build(COLOUR, sharding.make_mesh(MeshConfig(), ONE)).init(jax.random.key(0))
    head = state.params["head"]
    head["kernel"] = jax.random.normal(jax.random.key(1), head["kernel"].shape)
    workdir = save(COLOUR, tmp_path_factory.mktemp("runs") / "run", state)
    write_json(epath.Path(workdir) / CLASS_NAMES, NAMES)
    return workdir


@pytest.fixture(scope="module")
def loaded(run):
    return supmim_jax.load(run, ONE)


def picture(seed: int = 0, height: int = 31, width: int = 45) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_importing_the_package_is_light():
    code = "import sys, supmim_jax; print([x for x in ('jax', 'numpy', 'cv2') if x in sys.modules])"
    ran = python("-c", code)
    assert ran.stdout == "[]\n", ran.stderr
    with pytest.raises(AttributeError, match="lode"):
        supmim_jax.lode  # noqa: B018


def test_embeddings_are_the_evaluations_features_to_the_bit(initial, cfg, one_device, tmp_path):
    dataset = loader.Dataset(cfg)
    model = encoder.restore(Checkpoint.open(initial), one_device)
    expected = features.extract(model, dataset.eval(cfg.data.eval_split, one_device))
    images = embed.split(cfg.data, cfg.data.eval_split)
    out = epath.Path(tmp_path / "embeddings.npz")
    settings = {"checkpoint": "x", "batch_size": cfg.eval.batch_size, "shard": 500}
    embed.embed(supmim_jax.load(initial, ONE), images, out, **settings)
    with np.load(out) as arrays:
        np.testing.assert_array_equal(arrays["embedding"], expected.pooled)
        np.testing.assert_array_equal(arrays["label"], expected.label)
        assert arrays["name"].tolist() == [str(i) for i in expected.id]


def test_every_form_of_an_image_gives_the_same(loaded, tmp_path):
    array = picture()
    image = Image.fromarray(array)
    image.save(tmp_path / "x.png")
    expected = loaded.embed(array)
    assert expected.shape == (1, 32) and expected.dtype == np.float32
    forms = (image, tmp_path / "x.png", str(tmp_path), [array], array[None], [image, array][:1])
    for form in forms:
        np.testing.assert_array_equal(loaded.embed(form), expected)
    assert loaded.tokens(image).shape == (1, 5, 5, 32)
    prepared = loaded.preprocess(image)
    assert prepared.shape == (20, 20, 3) and prepared.dtype == np.uint8
    inside = jax.jit(lambda x: loaded.features(x).pooled * 2)(prepared[None])
    np.testing.assert_allclose(inside, 2 * expected, rtol=1e-5, atol=1e-6)


def test_a_pil_image_in_print_colours_is_as_its_file(loaded, tmp_path):
    path, image = tmp_path / "x.jpg", Image.fromarray(picture())
    image.convert("CMYK").save(path)
    with Image.open(path) as opened:
        assert opened.mode == "CMYK"
        gap = loaded.preprocess(opened).astype(int) - loaded.preprocess(path)
    assert abs(gap).max() <= 2
    with pytest.raises(BrokenImage, match="mode 'F'"):
        loaded.embed(image.convert("F"))


def test_the_network_takes_prepared_images_alone(loaded):
    batch = loaded.preprocess(picture())[None]
    for wrong in (batch / np.float32(255), batch[0], batch[:, :-1], batch.astype(int)):
        with pytest.raises(SetupError, match=r"uint8 images of shape \(images, 20, 20, 3\).*found"):
            loaded.features(wrong)


def test_orientation_transparency_and_grey_are_as_a_person_sees_them(loaded, tmp_path):
    array = cv2.GaussianBlur(picture(), (9, 9), 4)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(array).save(tmp_path / "x.png", exif=exif)
    turned = loaded.embed(np.rot90(array, -1))
    for form in (tmp_path / "x.png", Image.open(tmp_path / "x.png")):
        np.testing.assert_array_equal(loaded.embed(form), turned)
    clear = np.dstack([array, np.zeros(array.shape[:2], np.uint8)])
    np.testing.assert_array_equal(loaded.embed(clear), loaded.embed(np.full_like(array, 255)))
    grey = array[..., 0]
    np.testing.assert_array_equal(loaded.embed(grey), loaded.embed(np.dstack([grey] * 3)))
    # Sizes that a batch cannot hold beside each other, more than one batch of them.
    many = [picture(i, 20 + i, 60 - 3 * i) for i in range(10)]
    one_by_one = np.concatenate([loaded.embed(x, batch_size=4) for x in many])
    np.testing.assert_allclose(loaded.embed(many, batch_size=4), one_by_one, atol=1e-6)


def test_predictions(loaded):
    (row,) = loaded.predict(picture(), top=3)
    logits = np.asarray(loaded.features(loaded.preprocess(picture())[None]).logits)[0]
    order = np.argsort(-logits)[:3]
    assert [name for name, _ in row] == [NAMES[i] for i in order]
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    np.testing.assert_allclose([x for _, x in row], shares[order], rtol=1e-4)
    assert len(loaded.predict(picture(), top=99)[0]) == len(NAMES)


NEEDS = {"timm": "timm", "transformers": "transformers", "onnx": "jax2onnx", "stablehlo": "jax"}
AS_TORCH = "import torch\nx = torch.tensor(images).permute(0, 3, 1, 2) / 127.5 - 1\n"
SHOWN = {  # what gives `embedding`, where the card's own code does not
    "timm": f"{AS_TORCH}features = model.forward_features(x)\n"
    "embedding = model.forward_head(features, pre_logits=True).detach().numpy()",
    "transformers": f"{AS_TORCH}embedding = model(x).logits.detach().numpy()",
}


def test_what_was_exported_is_loaded_here_and_by_its_model_card_without_this_package(
    run, loaded, tmp_path
):
    """timm too, where it is installed; of transformers' classifier the logits are compared."""
    images = [picture(i) for i in range(3)]
    prepared = np.stack([loaded.preprocess(x) for x in images])
    np.save(tmp_path / "images.npy", prepared)
    code = "import os, sys\nimport numpy as np\nimages = np.load('images.npy')\n"
    exported = [to for to, module in NEEDS.items() if find_spec(module)]
    for to in exported:
        out = tmp_path / to
        export.export(run, to, out)
        if (out / "model.safetensors").exists():
            back = supmim_jax.load(out, ONE)
            assert back.class_names == loaded.class_names
            np.testing.assert_array_equal(back.preprocess(images[0]), prepared[0])
            np.testing.assert_allclose(back.embed(images), loaded.embed(images), atol=1e-4)
        card = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
        code += f"os.chdir({str(out)!r})\n{card}\n{SHOWN.get(to, '')}\n"
        code += "np.save('embedding.npy', embedding)\n"
    code += "assert 'supmim_jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    ours = loaded.features(prepared)
    for to in exported:
        expected = ours.logits if to == "transformers" else ours.pooled
        found = np.load(tmp_path / to / "embedding.npy")
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=to)


def test_weights_that_a_stablehlo_file_cannot_hold_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LARGEST", 1000)
    with pytest.raises(SetupError, match="StableHLO"):
        export.export(run, "stablehlo", tmp_path / "out")


@pytest.mark.parametrize("to", ["onnx", "stablehlo"])
def test_a_program_that_computes_something_else_is_not_kept(run, to, tmp_path, monkeypatch):
    pytest.importorskip(NEEDS[to], reason="not installed: pip install -e '.[onnx]'")
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(SetupError, match="embedding"):
        export.export(run, to, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_card_has_what_was_measured_at_its_step(run, tmp_path):
    workdir = Path(shutil.copytree(run, tmp_path / "run"))
    lines = [{"step": 0, "eval/top1": 12.5}, {"step": 7, "eval/top1": 99.0}]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (workdir / "evals").mkdir()
    own = {"name": COLOUR.data.name, "eval_split": COLOUR.data.eval_split}
    for data, step, metrics in (
        ({"name": "pets"}, 0, {"knn": 31.25}),
        ({"name": "pets"}, 7, {"knn": 98.0}),
        (own, 0, {"top1": 12.5}),  # what training measured already
    ):
        document = {"step": step, "data": data, "metrics": metrics}
        (workdir / f"evals/{data['name'].partition('/')[0]}-{step}.json").write_text(
            json.dumps(document)
        )
    export.export(str(workdir), "timm", tmp_path / "out")
    _, front, text = (tmp_path / "out/README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    (model,) = front["model-index"]
    assert [x["metrics"][0]["value"] for x in model["results"]] == [12.5, 31.25]
    assert front["license"] == "unknown" and front["library_name"] == "timm"
    assert "| 12.50 |" in text and "99.00" not in text and "beast 0" in text
    config = json.loads(text.split("```json\n")[1].split("```")[0])
    assert config["data"]["name"] == COLOUR.data.name
    hub = pytest.importorskip("huggingface_hub", reason="pip install huggingface_hub")
    card = hub.ModelCard.load(tmp_path / "out/README.md")
    assert [x.metric_value for x in card.data.eval_results] == [12.5, 31.25]


def test_names_are_noted_by_training(supervised, tmp_path):
    train(supervised, tmp_path / "run", stop_at=1, devices=ONE)
    names = json.loads((tmp_path / "run" / CLASS_NAMES).read_text())
    assert supmim_jax.load(tmp_path / "run").class_names == tuple(names)
    assert names[:2] == ["class 0", "class 1"]


def test_bad_input_is_one_error_that_names_it(run, loaded, cfg, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.png").write_text("no image")
    for images, message in (
        (tmp_path / "empty", r"empty has no image files"),
        (tmp_path / "words.png", r"words\.png begins with 6e 6f"),
        (tmp_path / "none.png", r"none\.png cannot be read"),
        ([], "No images"),
        (picture().astype(np.float32) * 2, r"float32 .* from 0 to 51\d.*uint8"),
        (np.zeros((9, 9, 5), np.uint8), r"\(9, 9, 5\)"),
        (np.zeros((0, 9), np.uint8), r"\(0, 9\)"),
        ("s3://bucket/x.png", "s3:"),
    ):
        with pytest.raises(SetupError, match=message):
            loaded.embed(images)
    for wrong in (0, 2.0):
        with pytest.raises(SetupError, match=f"batch_size is {wrong}"):
            loaded.embed(picture(), batch_size=wrong)
    with pytest.raises(SetupError, match="top is -1"):
        loaded.predict(picture(), top=-1)
    with pytest.raises(SetupError, match="given as NoneType"):
        loaded.embed(None)
    with pytest.raises(SetupError, match="max_value is -1"):
        supmim_jax.load(run, max_value=-1)
    assert loaded.embed(3 * [picture()], batch_size=2**40).shape == (3, 32)  # of as many as fit
    for size in ((1, 1), (3, 20_000)):
        assert np.isfinite(loaded.embed(picture(0, *size))).all()
    cv2.imwrite(str(tmp_path / "deep.png"), np.full((9, 9), 60_000, np.uint16))
    with pytest.raises(BrokenImage, match=r"deep\.png .*max_value"):
        loaded.embed(tmp_path / "deep.png")
    with pytest.raises(SetupError, match=r"no checkpoint in .*empty"):
        supmim_jax.load(tmp_path / "empty")
    mae = changed(cfg, objective=MAEConfig())
    with pytest.raises(SetupError, match="'mae', trained no classifier"):
        supmim_jax.load(save_initial(mae, tmp_path / "mae")).predict(picture()[..., 0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for i in range(9):
        (root / f"{i % 2}").mkdir(exist_ok=True)
        Image.fromarray(picture(i)).save(root / f"{i % 2}" / f"{i}.png")
    (root / "1" / "broken.jpg").write_text("words")
    (root / "notes.txt").write_text("words")
    return root


@pytest.fixture(scope="module")
def whole(loaded, folder, tmp_path_factory):
    """What embed writes of the folder in one go, with these settings."""
    out = epath.Path(tmp_path_factory.mktemp("whole") / "x.npz")
    settings = {"checkpoint": loaded.location, "batch_size": 2, "shard": 3}
    with pytest.warns(UserWarning, match=r"notes\.txt"):
        images = embed.folder(epath.Path(folder))
    assert embed.embed(loaded, images, out, **settings) == {"embedded": 9, "broken": 1}
    return images, out, settings


def test_embed_goes_on_where_it_was_killed(run, loaded, folder, whole, tmp_path, monkeypatch):
    images, complete, settings = whole
    out, made = epath.Path(tmp_path / "x.npz"), []

    def killed(*args):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(args)
        return original(*args)

    original = embed._embedded
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(embed, "_embedded", killed)
        embed.embed(loaded, images, out, **settings)
    plan = json.loads((tmp_path / "x.npz.parts" / embed.PLAN).read_text())
    assert plan["checkpoint"] == f"{run}/checkpoints/0"
    for other in ({"shard": 4}, {"dtype": "float16"}, {"checkpoint": "d"}):
        with pytest.raises(SetupError, match=r"x\.npz\.parts holds"):
            embed.embed(loaded, images, out, **settings | other)
    assert embed.embed(loaded, images, out, **settings)["embedded"] < 9
    assert out.read_bytes() == complete.read_bytes()
    assert "1/broken.jpg\t1/broken.jpg begins with" in (tmp_path / "x.npz.broken.txt").read_text()
    with np.load(out) as arrays:
        names = arrays["name"].tolist()
        assert names == sorted(f"{i % 2}/{i}.png" for i in range(9))
        expected = loaded.embed([folder / name for name in names], batch_size=2)
        np.testing.assert_allclose(arrays["embedding"], expected, atol=1e-6)
    with pytest.raises(SetupError, match=r"x\.npz already exists"):
        embed.embed(loaded, images, out, **settings)


def test_other_forms_of_the_output(loaded, whole, tmp_path):
    images, complete, settings = whole
    expected = np.load(complete)["embedding"]
    out = epath.Path(tmp_path / "half")
    embed.embed(loaded, images, out, **settings | {"dtype": "bfloat16", "shard": 6})
    files = sorted(x.name for x in out.iterdir())
    assert files == [f"embeddings-0000{i}-of-00002.npz" for i in range(2)] + ["plan.json"]
    shards = [np.load(out / name)["embedding"].view(jax.numpy.bfloat16) for name in files[:2]]
    np.testing.assert_allclose(np.concatenate(shards).astype(np.float32), expected, atol=0.05)
    parquet = pytest.importorskip("pyarrow.parquet")
    embed.embed(loaded, images, epath.Path(tmp_path / "x.parquet"), **settings)
    table = parquet.read_table(tmp_path / "x.parquet")
    np.testing.assert_allclose(np.stack(table["embedding"].to_numpy()), expected, atol=1e-6)


def test_what_embed_cannot_write_is_refused_before_anything_is_computed(loaded, tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "l\udce9.png").write_bytes(b"")
    with pytest.raises(SetupError, match=r"odd has a file 'l\\udce9\.png'.*UTF-8"):
        embed.folder(epath.Path(tmp_path / "odd"))
    images = embed.Images(["x"], {}.get, {})
    for ending in ("npy", "txt", "nzp"):
        out = epath.Path(tmp_path / f"x.{ending}")
        with pytest.raises(SetupError, match=rf"no \.{ending} is written"):
            embed.embed(loaded, images, out, checkpoint="x")
        assert not out.exists()


def test_two_processes_share_the_work(run, folder, whole, tmp_path):
    _, complete, _ = whole
    command = ["-m", "supmim_jax.embed", f"--checkpoint={run}", f"--images={folder}"]
    command += [f"--out={tmp_path / 'shared.npz'}", "--shard=3", "--batch_size=2"]
    commands = [[*command, *place] for place in places(2)]
    *both, refused = ended(started([*commands, [*command, "--name=fractals/tiny"]]))
    for process in both:
        assert process.code == 0, process.err
        assert "broken.jpg" in process.err or "9 embeddings" in process.out
    assert complete.read_bytes() == (tmp_path / "shared.npz").read_bytes()
    assert refused.code == 2 and "--images" in refused.err
