"""An encoder in Python and by the embed command: what it gives is what evaluations see."""

import dataclasses
import json
import subprocess
import sys

import cv2
import jax
import numpy as np
import pytest
import yaml
from conftest import REPOSITORY
from etils import epath
from PIL import Image
from test_processes import ended, free_port, started

import supmim_jax
from supmim_jax import checkpoint, embed, encoder, export, sharding, train_step
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import MAEConfig, MeshConfig
from supmim_jax.data import loader
from supmim_jax.errors import SetupError
from supmim_jax.evals import features
from supmim_jax.inference import BrokenImage
from supmim_jax.storage import write_json
from supmim_jax.workdir import CLASS_NAMES


def untrained(cfg, workdir) -> str:
    """The --workdir of a run with a checkpoint whose head is not zero."""
    one = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    state = train_step.build(cfg, one).init(jax.random.key(0))
    if "head" in state.params:
        kernel = jax.random.normal(jax.random.key(1), state.params["head"]["kernel"].shape)
        state.params["head"]["kernel"] = kernel
    checkpoints = checkpoint.Checkpoints(workdir, cfg.checkpoint)
    checkpoints.save(state, cfg, checkpoint.BEGIN)
    checkpoints.close()
    return str(workdir)


@pytest.fixture
def colour(supervised):
    """A classifier of colour images."""
    data = dataclasses.replace(supervised.data, channels=3, eval_resize=22)
    return dataclasses.replace(supervised, data=data)


@pytest.fixture
def run(colour, tmp_path) -> str:
    workdir = untrained(colour, tmp_path / "run")
    names = [f"beast {i}" for i in range(colour.data.num_classes)]
    write_json(epath.Path(workdir) / CLASS_NAMES, names)
    return workdir


@pytest.fixture
def loaded(run):
    return supmim_jax.load(run, jax.devices()[:1])


def picture(seed: int = 0, height: int = 31, width: int = 45) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_importing_the_package_is_light():
    code = "import sys, supmim_jax; print([x for x in ('jax', 'numpy', 'cv2') if x in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True)
    assert ran.stdout == b"[]\n", ran.stderr
    with pytest.raises(AttributeError, match="lode"):
        supmim_jax.lode  # noqa: B018


def test_embeddings_are_the_evaluations_features_to_the_bit(initial, cfg, one_device, tmp_path):
    dataset = loader.Dataset(cfg)
    model = encoder.restore(Checkpoint.open(initial), one_device)
    expected = features.extract(model, dataset.eval(cfg.data.eval_split, one_device))
    loaded = supmim_jax.load(initial, jax.devices()[:1])
    images = embed.Split(cfg.data, cfg.data.eval_split)
    out = epath.Path(tmp_path / "embeddings.npz")
    embed.embed(loaded, images, out, checkpoint="x", batch_size=cfg.eval.batch_size, shard=500)
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


def test_predictions(loaded, colour):
    (row,) = loaded.predict(picture(), top=3)
    logits = np.asarray(loaded.features(loaded.preprocess(picture())[None]).logits)[0]
    order = np.argsort(-logits)[:3]
    assert [name for name, _ in row] == [f"beast {i}" for i in order]
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    np.testing.assert_allclose([x for _, x in row], shares[order], rtol=1e-4)
    assert len(loaded.predict(picture(), top=99)[0]) == colour.data.num_classes


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_what_was_exported_is_loaded(run, loaded, library, tmp_path):
    export.export(run, library, tmp_path / "out")
    back = supmim_jax.load(tmp_path / "out", jax.devices()[:1])
    assert back.class_names == loaded.class_names
    images = [picture(i) for i in range(3)]
    np.testing.assert_array_equal(back.preprocess(images[0]), loaded.preprocess(images[0]))
    np.testing.assert_allclose(back.embed(images), loaded.embed(images), atol=1e-4)


NEEDS = {"timm": "timm", "transformers": "transformers", "onnx": "jax2onnx", "stablehlo": "jax"}


@pytest.mark.parametrize("to", NEEDS)
def test_the_code_of_a_model_card_loads_what_was_exported_without_this_package(
    run, loaded, to, tmp_path
):
    pytest.importorskip(NEEDS[to], reason=f"not installed: pip install -e '.[parity,{to}]'")
    out = tmp_path / "out"
    export.export(run, to, out)
    images = np.stack([loaded.preprocess(picture(i)) for i in range(3)])
    np.save(out / "images.npy", images)
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    show = {
        "timm": "embedding = model.forward_head(model.forward_features(x), pre_logits=True)",
        "transformers": "embedding = model(x).logits",
    }
    lines = ["import sys", "import numpy as np", "images = np.load('images.npy')", code]
    if to in show:
        lines += ["import torch", "x = torch.tensor(images).permute(0, 3, 1, 2) / 127.5 - 1"]
        lines += [show[to], "embedding = embedding.detach().numpy()"]
    lines += ["np.save('embedding.npy', embedding)", "assert 'supmim_jax' not in sys.modules"]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=out, check=True)
    expected = loaded.features(images)
    expected = expected.logits if to == "transformers" else expected.pooled
    np.testing.assert_allclose(np.load(out / "embedding.npy"), expected, rtol=1e-5, atol=1e-5)


def test_weights_that_a_stablehlo_file_cannot_hold_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LARGEST", 1000)
    with pytest.raises(SetupError, match="more than a StableHLO file"):
        export.export(run, "stablehlo", tmp_path / "out")


@pytest.mark.parametrize("to", ["onnx", "stablehlo"])
def test_a_program_that_computes_something_else_is_not_kept(run, to, tmp_path, monkeypatch):
    pytest.importorskip(NEEDS[to], reason="not installed: pip install -e '.[onnx]'")
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(SetupError, match="embedding"):
        export.export(run, to, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


def test_a_model_card_has_what_was_measured_at_its_step(run, colour, tmp_path):
    lines = [{"step": 0, "eval/top1": 12.5}, {"step": 7, "eval/top1": 99.0}]
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (tmp_path / "run/evals").mkdir()
    for step, value in ((0, 31.25), (7, 98.0)):
        document = {"step": step, "data": {"name": "pets"}, "metrics": {"knn": value}}
        (tmp_path / f"run/evals/pets-{step}.json").write_text(json.dumps(document))
    export.export(run, "timm", tmp_path / "out")
    _, front, text = (tmp_path / "out/README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    (model,) = front["model-index"]
    assert [x["metrics"][0]["value"] for x in model["results"]] == [12.5, 31.25]
    assert front["license"] == "unknown" and front["library_name"] == "timm"
    assert "| 12.50 |" in text and "99.00" not in text and "beast 0" in text
    assert (
        json.loads(text.split("```json\n")[1].split("```")[0])["data"]["name"] == colour.data.name
    )
    hub = pytest.importorskip("huggingface_hub", reason="pip install huggingface_hub")
    card = hub.ModelCard.load(tmp_path / "out/README.md")
    assert [x.metric_value for x in card.data.eval_results] == [12.5, 31.25]


def test_names_are_noted_by_training(supervised, tmp_path):
    from supmim_jax.train import train

    train(supervised, tmp_path / "run", stop_at=1, devices=jax.devices()[:1])
    assert supmim_jax.load(tmp_path / "run").class_names[:2] == ("class 0", "class 1")


def test_bad_input_is_one_error_that_names_it(loaded, cfg, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.png").write_text("no image")
    for images, message in (
        (tmp_path / "empty", r"empty has no image files"),
        (tmp_path / "words.png", r"words\.png begins with 6e 6f"),
        (tmp_path / "none.png", r"none\.png cannot be read"),
        ([], "No images"),
        (picture().astype(np.float32) * 2, r"float32 with values from 0 to 51\d.*uint8"),
        (np.zeros((9, 9, 5), np.uint8), r"\(9, 9, 5\)"),
        (np.zeros((0, 9), np.uint8), r"\(0, 9\)"),
        ("s3://bucket/x.png", "s3:"),
    ):
        with pytest.raises(SetupError, match=message):
            loaded.embed(images)
    with pytest.raises(SetupError, match="batch_size is 0"):
        loaded.embed(picture(), batch_size=0)
    for size in ((1, 1), (3, 20_000)):
        assert np.isfinite(loaded.embed(picture(0, *size))).all()
    deep = np.full((9, 9), 60_000, np.uint16)
    cv2.imwrite(str(tmp_path / "deep.png"), deep)
    with pytest.raises(BrokenImage, match=r"deep\.png .*max_value"):
        loaded.embed(tmp_path / "deep.png")
    with pytest.raises(SetupError, match=r"no checkpoint in .*empty"):
        supmim_jax.load(tmp_path / "empty")
    mae = dataclasses.replace(cfg, objective=MAEConfig())
    with pytest.raises(SetupError, match="'mae', trained no classifier"):
        supmim_jax.load(untrained(mae, tmp_path / "mae")).predict(picture()[..., 0])


@pytest.fixture
def folder(tmp_path):
    for i in range(9):
        path = tmp_path / "photos" / f"{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(path)
    (tmp_path / "photos" / "1" / "broken.jpg").write_text("words")
    (tmp_path / "photos" / "notes.txt").write_text("words")
    return tmp_path / "photos"


def command(run: str, folder, out, *more: str) -> list[str]:
    flags = [f"--checkpoint={run}", f"--images={folder}", f"--out={out}", "--shard=3"]
    return ["-m", "supmim_jax.embed", *flags, "--batch_size=2", *more]


def test_the_command_goes_on_where_it_was_killed(run, loaded, folder, tmp_path, monkeypatch):
    with pytest.warns(UserWarning, match="no images by name: notes.txt"):
        images, out = embed.Folder(epath.Path(folder)), epath.Path(tmp_path / "x.npz")
    asked = {"checkpoint": "c", "batch_size": 2, "shard": 3}
    whole = tmp_path / "whole.npz"
    assert embed.embed(loaded, images, epath.Path(whole), **asked) == {"embedded": 9, "broken": 1}

    made, original = [], embed._embedded

    def killed(*args):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(args)
        return original(*args)

    monkeypatch.setattr(embed, "_embedded", killed)
    with pytest.raises(KeyboardInterrupt):
        embed.embed(loaded, images, out, **asked)
    monkeypatch.setattr(embed, "_embedded", original)
    for other in ({"shard": 4}, {"dtype": "float16"}, {"checkpoint": "d"}):
        with pytest.raises(SetupError, match=r"x\.npz\.parts holds embeddings of"):
            embed.embed(loaded, images, out, **asked | other)
    assert embed.embed(loaded, images, out, **asked)["embedded"] < 9
    assert out.read_bytes() == whole.read_bytes()
    assert "1/broken.jpg\t1/broken.jpg begins with" in (tmp_path / "x.npz.broken.txt").read_text()
    with np.load(out) as arrays:
        names = arrays["name"].tolist()
        assert names == sorted(f"{i % 2}/{i}.png" for i in range(9))
        expected = loaded.embed([folder / name for name in names], batch_size=2)
        np.testing.assert_allclose(arrays["embedding"], expected, atol=1e-6)
    with pytest.raises(SetupError, match=r"x\.npz already exists"):
        embed.embed(loaded, images, out, **asked)


def test_other_forms_of_the_output(loaded, folder, tmp_path):
    images = embed.Folder(epath.Path(folder))
    expected = loaded.embed([folder / x for x in images.names if "broken" not in x], 2)
    out = epath.Path(tmp_path / "half")
    embed.embed(loaded, images, out, checkpoint="c", dtype="bfloat16", batch_size=2, shard=6)
    files = sorted(x.name for x in out.iterdir())
    assert files == [f"embeddings-0000{i}-of-00002.npz" for i in range(2)] + ["plan.json"]
    shards = [np.load(out / name)["embedding"].view(jax.numpy.bfloat16) for name in files[:2]]
    np.testing.assert_allclose(np.concatenate(shards).astype(np.float32), expected, atol=0.05)
    parquet = pytest.importorskip("pyarrow.parquet")
    embed.embed(loaded, images, epath.Path(tmp_path / "x.parquet"), checkpoint="c", batch_size=2)
    table = parquet.read_table(tmp_path / "x.parquet")
    np.testing.assert_allclose(np.stack(table["embedding"].to_numpy()), expected, atol=1e-6)


def test_two_processes_share_the_work(run, folder, tmp_path):
    alone, shared = tmp_path / "alone.npz", tmp_path / "shared.npz"
    port = free_port()
    commands = [
        command(
            run, folder, shared, "--distributed", f"--coordinator=127.0.0.1:{port}",
            "--num_processes=2", f"--process_id={i}",
        )
        for i in range(2)
    ]  # fmt: skip
    for process in ended(started([command(run, folder, alone), *commands])):
        assert process.code == 0, process.err
        assert "broken.jpg" in process.err or "9 embeddings" in process.out
    assert alone.read_bytes() == shared.read_bytes()
    refused = subprocess.run(
        [sys.executable, *command(run, folder, alone, "--name=fractals/tiny")],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert refused.returncode == 2 and "either --images" in refused.stderr


def test_the_plan_names_the_checkpoint(run, loaded, folder, tmp_path):
    embed.embed(
        loaded, embed.Folder(epath.Path(folder)), epath.Path(tmp_path / "x"),
        checkpoint=loaded.location,
    )  # fmt: skip
    plan = json.loads((tmp_path / "x" / embed.PLAN).read_text())
    assert plan["checkpoint"] == f"{run}/checkpoints/0"
