"""The token cache: equal to tokens made in the step, refused where it isn't, safe to restart."""

import dataclasses
import itertools
import json
import shutil
from unittest import mock

import cv2
import jax
import numpy as np
import pytest
from conftest import ONE, make_frozen
from etils import epath

from supmim_jax import cache_tokens, encoder, storage, tokenizers, train_step, visualize
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import TokensConfig, VQGANConfig, changed
from supmim_jax.data import source as source_module
from supmim_jax.data import token_cache
from supmim_jax.data.loader import Dataset
from supmim_jax.errors import ConfigError, SetupError
from supmim_jax.train import train
from supmim_jax.train_step import TrainStep

pytestmark = pytest.mark.usefixtures("build_once")


def with_cache(cfg, directory, views=0):
    return dataclasses.replace(cfg, tokens=TokensConfig(cache=str(directory), views=views))


def assert_same_tokens(cfg, *directories, views):
    """Of every view of every example."""
    a, b = (Dataset.open(with_cache(cfg, d, views)) for d in directories)
    images = [record["image"] for record in a.training_records()]
    for v, i in itertools.product(range(views), range(64)):
        assert (a.tokens.read(v, i, images[i]) == b.tokens.read(v, i, images[i])).all()


def opened(cfg, directory):
    """The cache, and the encoded images."""
    dataset = Dataset.open(with_cache(cfg, directory))
    return dataset.tokens, [record["image"] for record in dataset.training_records()]


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return epath.Path(tmp_path_factory.mktemp("caches"))


@pytest.fixture
def cache(cfg, caches):
    """Three views of 64 images in shards of 50."""
    directory = caches / "three"
    if not directory.exists():
        cache_tokens.tokenize(cfg, directory, views=3, records_per_shard=50)
    return directory


def steps(cfg, device, codes) -> tuple[list, list]:
    """Losses and tokens of every step of the run."""
    built = TrainStep.build(cfg, device)
    state, losses, tokens = built.init(jax.random.key(0)), [], []
    tokenizer = encoder.build_tokenizer(cfg, cfg.batch_size, device)
    for batch in Dataset.open(cfg).train(device):
        if batch.tokens is None:
            image = batch.views[0] if batch.target is None else batch.target
            tokens.append(np.asarray(tokenizer.encode(codes["target"]["tokenizer"], image)))
        else:
            tokens.append(np.asarray(batch.tokens))
        state, metrics = built.step(state, batch, codes if built.frozen else {})
        losses.append([float(metrics[k]) for k in ("loss", "ce", "mim", "grad_norm")])
    return losses, tokens


def colourful(cfg):
    """Three channels, RandAugment, and a VQGAN as the tokenizer."""
    size = {"filters": 8, "multipliers": (1, 2, 2), "res_blocks": 1, "groups": 4}
    target = VQGANConfig(**size, codes=16, code_dim=4)
    data = {"name": "fractals/tiny_colour", "channels": 3, "crop": "inception"}
    cfg = changed(cfg, data=data | {"augment": "rand_augment"})
    return dataclasses.replace(cfg, objective=dataclasses.replace(cfg.objective, target=target))


@pytest.mark.parametrize("kind", ["patch_codes", pytest.param("vqgan", marks=pytest.mark.slow)])
def test_cached_tokens_and_losses_are_those_of_a_run_without(
    cfg, caches, one_device, kind, monkeypatch
):
    """Every example of every step, also where two views cycle over four epochs."""
    cfg = colourful(cfg) if kind == "vqgan" else cfg
    cfg = dataclasses.replace(cfg, epochs=4, tokens=TokensConfig(views=2))
    codes = make_frozen(cfg)
    monkeypatch.setattr(tokenizers, "open_tokenizer", lambda *_: codes["target"]["tokenizer"])
    directory = caches / kind
    cache_tokens.tokenize(cfg, directory, views=2)
    online, tokens = steps(cfg, one_device, codes)
    with_tokens = with_cache(cfg, directory, 2)
    assert TrainStep.build(with_tokens, one_device).frozen == {}
    cached, same_tokens = steps(with_tokens, one_device, codes)
    assert len(tokens) == cfg.total_steps >= 12
    assert all((a == b).all() for a, b in zip(tokens, same_tokens, strict=True))
    assert len(np.unique(tokens)) > 4
    np.testing.assert_allclose(cached, online, rtol=1e-6)


def test_a_run_from_a_cache_trains_and_its_picture_finds_the_codebook(cfg, cache, tmp_path):
    results = train(with_cache(cfg, cache), tmp_path, devices=ONE)
    again = train(cfg, tmp_path / "online", devices=ONE)
    assert results["top1"] == again["top1"] and results["knn"] == again["knn"]
    restored = visualize.restore(Checkpoint.open(str(tmp_path)))
    assert (restored.tokenizer.arrays["codes"] == np.load(cache / tokenizers.FILE)["codes"]).all()


def test_writing_goes_on_where_it_stopped_and_the_estimate_holds(cfg, caches, cache, monkeypatch):
    directory, write, written = caches / "restarted", token_cache.write_shard, []

    def failing(*given):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(given)
        write(*given)

    def files():
        return {p.name: p.stat() for p in directory.glob("tokens-*")}

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(token_cache, "write_shard", failing)
        cache_tokens.tokenize(cfg, directory, views=2, records_per_shard=40)
    before = files()
    assert len(before) == 2
    plan = cache_tokens.tokenize(cfg, directory, views=2, records_per_shard=40)
    assert len(files()) == plan.shards == 4 and before.items() <= files().items()
    assert sum(x.length for x in files().values()) <= cache_tokens.estimated_bytes(plan)
    assert_same_tokens(cfg, directory, cache, views=2)


def test_processes_share_the_shards(cfg, caches, cache, monkeypatch):
    directory = caches / "shared"
    for process in (1, 0):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(
            tokenizers, "open_tokenizer", lambda *_: dict(np.load(cache / tokenizers.FILE))
        )
        cache_tokens.tokenize(cfg, directory, views=3, records_per_shard=50)
        done = sorted(p.name[7:12] for p in directory.glob("tokens-*"))
        assert done == (["00001", "00003"] if process else ["00000", "00001", "00002", "00003"])
    monkeypatch.undo()
    assert_same_tokens(cfg, cache, directory, views=3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 5}, r"run: config\.seed: 0; 5"),
        ({"epochs": 9}, r"3 views .* 9\. Set config.tokens.views=3"),
        ({"data": {"flip": False}}, r"config\.data\.flip: True; False"),
        ({"data": {"train_split": "train[64:128]"}}, r"train_split: 'train\[:64\]'"),
        ({"data": {"background": (0, 0, 0)}}, r"config\.data\.background"),
        ({"data": {"max_value": 255.0}}, r"config\.data\.max_value"),
        ({"model": {"patch": 5}}, r"config\.model\.patch: 4; 5"),
        ({"objective": {"target": {"codes": 17}}}, r"config\.objective\.target\.codes: 16; 17"),
    ],
)
def test_a_cache_of_another_run_is_refused_naming_the_difference(cfg, cache, change, named):
    with pytest.raises(SetupError, match=named):
        Dataset.open(changed(with_cache(cfg, cache), **change))


def test_crops_around_the_centre_have_a_cache_and_moving_ones_have_none(
    cfg, caches, one_device, monkeypatch
):
    def around(boxes="centre", **changes):
        contrastive = {"boxes": boxes} | changes
        return changed(cfg, data={"crop": "contrastive", "contrastive_crop": contrastive})

    codes = make_frozen(cfg)
    monkeypatch.setattr(tokenizers, "open_tokenizer", lambda *_: codes["target"]["tokenizer"])
    directory = caches / "centre"
    cache_tokens.tokenize(around(), directory, views=3)
    tokenizer = encoder.build_tokenizer(cfg, cfg.batch_size, one_device)
    cached = Dataset.open(with_cache(around(), directory)).train(one_device)
    for a, b in zip(Dataset.open(around()).train(one_device), cached, strict=True):
        target = a.views[0] if a.target is None else a.target
        ids = tokenizer.encode(codes["target"]["tokenizer"], target)
        assert (np.asarray(ids) == np.asarray(b.tokens)).all()
    with pytest.raises(SetupError, match=r"config\.data\.contrastive_crop\.alpha: 0\.6; 0\.1"):
        Dataset.open(with_cache(around(alpha=0.1), directory))
    Dataset.open(with_cache(around(threshold=0.5), directory))  # of other boxes
    for other in (changed(cfg, data={"crop": "inception"}), cfg):
        with pytest.raises(SetupError, match=r"config\.data\.crop: 'contrastive'; '\w+'"):
            Dataset.open(with_cache(other, directory))
    with pytest.raises(ConfigError, match="boxes is 'heat_map'"):
        cache_tokens.tokenize(around("heat_map"), caches / "moving", views=3)
    assert not (caches / "moving").exists()


def test_a_cache_is_of_one_family_of_moving_operations(cfg):
    """A cache from before there were two of them names none: its crops were of neither."""

    def fingerprint(**changes):
        data = {"channels": 3, "crop": "inception", "augment_magnitude": 9.0} | changes
        return token_cache.fingerprint(changed(cfg, data=data), "0" * 64, "1.0.0")

    augreg, timm = (fingerprint(augment=name) for name in ("rand_augment", "timm_rand_augment"))
    before = json.loads(json.dumps(augreg))
    del before["augmentation"]["augment"]
    directory = epath.Path("there")
    for stored in (before, timm, fingerprint(augment="rand_augment", crop="inception_tf")):
        with pytest.raises(SetupError, match=r"there .*config\.data\.(augment|crop): "):
            token_cache.check_same(stored, augreg, directory)
    # What moves nothing is as it was: such caches stay valid.
    plain = fingerprint(augment="three_augment")
    assert plain["augmentation"]["rand_augment"] is False and "augment" not in plain["augmentation"]
    token_cache.check_same(fingerprint(augment="none"), plain, directory)
    with pytest.raises(SetupError, match=r"config\.data\.augment moves pixels: True; False"):
        token_cache.check_same(augreg, plain, directory)
    with pytest.raises(SetupError, match=r"run: SHA-256 of the tokenizer: '0+'; '1+'"):
        token_cache.check_same(plain, plain | {"tokenizer_sha256": "1" * 64}, directory)


def test_a_cache_of_another_version_of_the_data_is_refused(cfg, cache):
    with pytest.raises(SetupError, match=r"version of the data set: '\d.*'; '9\.9\.9'"):
        token_cache.TokenCache.open(with_cache(cfg, cache), "9.9.9")


def test_what_does_not_touch_the_tokens_may_differ(cfg, cache):
    other = {"objective": {"mask_ratio": 0.7}, "optim": {"lr": 0.5}}
    Dataset.open(changed(with_cache(cfg, cache), **other))


def test_tokens_of_another_codebook_are_refused(cfg, cache, one_device, tmp_path):
    path = tmp_path / "codes.npz"
    np.savez(path, codes=np.zeros((16, 16), np.float32))
    other = changed(with_cache(cfg, cache), objective={"target": {"path": str(path)}})
    with pytest.raises(SetupError, match="is not the tokenizer that made the token cache"):
        train(other, tmp_path / "run", devices=ONE)
    assert not (tmp_path / "run").exists()
    np.savez(path, codes=np.load(cache / tokenizers.FILE)["codes"])
    step_fn = train_step.TrainStep.build(other, one_device)
    tokenizers.Frozen.open(other, Dataset.open(other), epath.Path(tmp_path), step_fn)
    # Also one that took the place of the cache's own.
    copy = shutil.copytree(cache, tmp_path / "copy")
    np.savez(copy / tokenizers.FILE, codes=np.load(cache / tokenizers.FILE)["codes"] + 1)
    other = with_cache(cfg, copy)
    with pytest.raises(SetupError, match=r"tokenizer\.npz is not the tokenizer that made"):
        tokenizers.open_tokenizer(other, Dataset.open(other), epath.Path(tmp_path), {})


def test_a_run_goes_on_without_its_cache_or_with_a_copy_but_not_with_other_tokens(
    cfg, cache, caches, tmp_path
):
    run, workdir = with_cache(cfg, cache), tmp_path / "run"
    train(run, workdir, stop_at=4, devices=ONE)
    train(with_cache(cfg, shutil.copytree(cache, caches / "copy")), workdir, stop_at=6, devices=ONE)

    def by(path):
        return changed(cfg, objective={"target": {"path": str(path)}})

    train(by(cache / tokenizers.FILE), workdir, stop_at=8, devices=ONE)
    other = tmp_path / "codes.npz"
    np.savez(other, codes=np.load(cache / tokenizers.FILE)["codes"] + 0.01)
    with pytest.raises(SetupError, match=r"tokenizer of SHA-256 \w{12}\.\.\."):
        train(by(other), workdir, devices=ONE)


def test_damage_is_named(cfg, cache, tmp_path):
    def refused(name, damage, message):
        directory = shutil.copytree(cache, tmp_path / name)
        damage(directory / "tokens-00002-of-00004.arrayrecord")
        with pytest.raises(SetupError, match=message):
            Dataset.open(with_cache(cfg, directory))

    shard = "tokens-00002-of-00004.arrayrecord"
    refused("missing", lambda path: path.unlink(), f"{shard} is missing")
    for cut in (1000, 70_000):
        refused(
            f"cut{cut}",
            lambda path, cut=cut: path.write_bytes(path.read_bytes()[:cut]),
            f"damaged.*{shard} (is cut|has 0)",
        )
    short = dataclasses.replace(token_cache.read_plan(cache), records_per_shard=7, views=1)
    rows = [(np.zeros(25, np.uint16), 0)] * 50

    def fewer(path):
        token_cache.write_shard(path.parent, short, 2, rows[:7])
        (path.parent / f"tokens-00002-of-{short.shards:05d}.arrayrecord").replace(path)

    refused("fewer", fewer, f"{shard} has 7 records, expected 50")
    refused(
        "manifest",
        lambda path: (path.parent / token_cache.MANIFEST).write_text("{"),
        r"manifest\.json cannot be read",
    )
    zeros = shutil.copytree(cache, tmp_path / "zeros")
    token_cache.write_shard(zeros, token_cache.read_plan(cache), 2, rows)
    found, images = opened(cfg, zeros)
    with pytest.raises(SetupError, match=r"00002.*view 1 of example 40 "):
        found.read(1, 40, images[40])
    with pytest.raises(SetupError, match="nowhere"):
        Dataset.open(with_cache(cfg, tmp_path / "nowhere"))


def test_tokens_are_those_of_the_image_that_was_tokenised(cfg, cache):
    """Data sets without seals may have changed unseen; their records' tokens then don't fit."""
    found, images = opened(cfg, cache)
    found.read(2, 5, images[5])
    for wrong in (images[6], images[5][:-1], images[5] + b"x", b""):
        with pytest.raises(SetupError, match=r"checksum of view 2 of example 5 "):
            found.read(2, 5, wrong)


@pytest.mark.parametrize(
    "change", [{"views": 2}, {"records_per_shard": 49}, {"codes": 15}, {"x": 1}]
)
def test_a_manifest_that_was_changed_is_refused(cfg, cache, tmp_path, change):
    values = json.loads((cache / token_cache.MANIFEST).read_text())
    for wrong in (values | change, {k: x for k, x in values.items() if k != "sha256"}):
        (tmp_path / token_cache.MANIFEST).write_text(json.dumps(wrong))
        with pytest.raises(SetupError, match=r"manifest\.json cannot be read"):
            Dataset.open(with_cache(cfg, tmp_path))


def test_a_records_checksum_is_of_all_that_it_belongs_to():
    """Of the cache, the place in it (views of an image have one mark), the image and the ids."""
    given = (bytes(32), 5, 7, b"ids")
    others = [(bytes(31) + b"x", 5, 7, b"ids"), (bytes(32), 6, 7, b"ids")]
    others += [(bytes(32), 5, 8, b"ids"), (bytes(32), 5, 7, b"idt")]
    assert len({token_cache._checksum(*x) for x in (given, *others)}) == 5


@pytest.mark.parametrize("bits", range(1, 17))
def test_ids_are_packed_without_loss_and_16_bits_are_those_of_earlier_versions(bits):
    for count in (1, 3, 25, 256):
        ids = np.random.default_rng(count).integers(0, 2**bits, count, np.uint16)
        packed = token_cache.packed(ids, bits)
        found = token_cache.unpacked(packed, bits, count)
        assert found.dtype == np.uint16 and (found == ids).all()
        assert len(packed) == -(-count * bits // 8)
        assert bits < 16 or packed == ids.astype("<u2").tobytes()


def test_a_cache_in_use_is_not_written_over(cfg, cache):
    before = json.loads((cache / token_cache.MANIFEST).read_text())
    with pytest.raises(SetupError, match=r"3 views in shards of 50; .* 4"):
        cache_tokens.tokenize(cfg, cache, views=4, records_per_shard=50)
    with pytest.raises(SetupError, match=r"config\.seed: 0; 1"):
        cache_tokens.tokenize(changed(cfg, seed=1), cache, views=3, records_per_shard=50)
    assert json.loads((cache / token_cache.MANIFEST).read_text()) == before


def test_a_run_without_tokens_has_no_cache(supervised, tmp_path):
    with pytest.raises(ConfigError, match="objective"):
        cache_tokens.tokenize(supervised, epath.Path(tmp_path), views=1)
    with pytest.raises(ConfigError, match="no tokens"):
        with_cache(supervised, tmp_path)


def test_a_disk_that_is_too_small_is_reported_before_anything_is_written(
    cfg, tmp_path, monkeypatch
):
    monkeypatch.setattr(storage, "free_bytes", lambda _: 1000)
    with pytest.raises(SetupError, match=r"cache.* 1000 bytes"):
        cache_tokens.tokenize(cfg, epath.Path(tmp_path) / "cache", views=3)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_of_an_earlier_version_serves_plain_images_alone(cfg, cache, tmp_path, monkeypatch):
    """It did not look at transparency: what it holds of other images is of something else."""
    old = epath.Path(tmp_path / "old")
    fingerprint = token_cache.fingerprint

    def earlier(*given):
        found = fingerprint(*given)
        del found["shown"]
        return found

    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "fingerprint", earlier)
        cache_tokens.tokenize(cfg, old, views=3, records_per_shard=50)
    (new, images), (found, _) = (opened(cfg, d) for d in (cache, old))
    for i in (0, 40, 63):
        assert (found.read(1, i, images[i]) == new.read(1, i, images[i])).all()
    rgba = np.zeros((8, 8, 4), np.uint8)
    for image in (rgba, rgba[..., :1].astype(np.uint16)):
        with pytest.raises(SetupError, match=r"old.*example 3.*cache_tokens"):
            found.read(1, 3, cv2.imencode(".png", image)[1].tobytes())


def test_a_cache_of_many_shards_has_few_open_and_outlives_a_system_error(cfg, cache, monkeypatch):
    found, images = opened(cfg, cache)
    monkeypatch.setattr(source_module, "most_open", lambda: 1)
    wanted = [found.read(view, 5, images[5]) for view in (0, 1, 2)]
    assert len(found.readers.open) == 1

    said = RuntimeError("open() failed: Too many open files; opening x")
    failing = mock.Mock(**{"return_value.read.side_effect": said})
    with monkeypatch.context() as patch:
        patch.setattr(source_module.array_record_module, "ArrayRecordReader", failing)
        with pytest.raises(SetupError, match=r"tokens-00000-of-00004.*ulimit"):
            found.read(0, 5, images[5])
    assert (found.read(0, 5, images[5]) == wanted[0]).all()
