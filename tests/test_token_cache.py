"""The token cache: equal to tokens made in the step, refused where it isn't, safe to restart."""

import dataclasses
import itertools
import json

import cv2
import jax
import numpy as np
import pytest
from conftest import make_frozen
from etils import epath

from supmim_jax import cache_tokens, encoder, sharding, storage, tokenizers, train_step
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import ContrastiveCropConfig, TokensConfig, VQGANConfig
from supmim_jax.data import source as source_module
from supmim_jax.data import token_cache
from supmim_jax.data.loader import Dataset
from supmim_jax.data.token_cache import TokenCache
from supmim_jax.errors import ConfigError, SetupError
from supmim_jax.train import train

ONE = jax.devices()[:1]


def with_cache(cfg, directory, views=0):
    return dataclasses.replace(cfg, tokens=TokensConfig(cache=str(directory), views=views))


def encoded_images(cfg) -> list[bytes]:
    source = source_module.open_source(cfg.data, cfg.data.train_split)
    return [source[i]["image"] for i in range(len(source))]


def replaced(cfg, section, **changes):
    return dataclasses.replace(
        cfg, **{section: dataclasses.replace(getattr(cfg, section), **changes)}
    )


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return epath.Path(tmp_path_factory.mktemp("caches"))


@pytest.fixture
def cache(cfg, caches):
    """Three views of 64 images in shards of 50."""
    directory = caches / "three"
    cache_tokens.tokenize(cfg, directory, views=3, records_per_shard=50)
    return directory


def open_cache(cfg):
    return TokenCache.open(cfg, source_module.Source(cfg.data).version)


def steps(cfg, device, codes) -> tuple[list, list]:
    """Losses and tokens of every step of the run."""
    built = train_step.build(cfg, device)
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
    data = dataclasses.replace(
        cfg.data,
        name="fractals/tiny_colour",
        channels=3,
        num_classes=30,
        image_size=20,
        eval_resize=24,
        crop="inception",
        augment="rand_augment",
        train_split="train[:48]",
        train_examples=48,
        eval_split="validation[:16]",
    )
    target = VQGANConfig(
        filters=8, multipliers=(1, 2, 2), res_blocks=1, groups=4, codes=16, code_dim=4
    )
    model = dataclasses.replace(cfg.model, patch=4)
    objective = dataclasses.replace(cfg.objective, target=target)
    return dataclasses.replace(cfg, data=data, model=model, objective=objective, epochs=4)


@pytest.mark.parametrize("kind", ["patch_codes", pytest.param("vqgan", marks=pytest.mark.slow)])
def test_cached_tokens_and_losses_are_those_of_a_run_without(
    cfg, caches, one_device, kind, monkeypatch
):
    """Every example of every step, also where two views cycle over four epochs."""
    cfg = colourful(cfg) if kind == "vqgan" else dataclasses.replace(cfg, epochs=4)
    cfg = dataclasses.replace(cfg, tokens=TokensConfig(views=2))
    codes = make_frozen(cfg)
    monkeypatch.setattr(tokenizers, "open_tokenizer", lambda *_: codes["target"]["tokenizer"])
    directory = caches / kind
    cache_tokens.tokenize(cfg, directory, views=2)
    online, tokens = steps(cfg, one_device, codes)
    cached, same_tokens = steps(with_cache(cfg, directory, 2), one_device, codes)
    assert len(tokens) == cfg.total_steps >= 12
    assert all((a == b).all() for a, b in zip(tokens, same_tokens, strict=True))
    assert len(np.unique(tokens)) > 4
    np.testing.assert_allclose(cached, online, rtol=1e-6)


def test_a_cached_step_carries_no_tokenizer_and_views_cycle(cfg, cache, one_device):
    cached = with_cache(dataclasses.replace(cfg, epochs=5), cache, views=3)
    built = train_step.build(cached, one_device)
    assert built.frozen == {} and built.batch.tokens.shape == (16, 25)
    rows = {}
    for step, batch in enumerate(Dataset.open(cached).train(one_device)):
        for example, ids in zip(np.asarray(batch.id), np.asarray(batch.tokens)):
            rows.setdefault((step // 4) % 3, {}).setdefault(int(example), set()).add(ids.tobytes())
    assert all(len(seen) == 1 for view in rows.values() for seen in view.values())
    assert rows[0] != rows[1] != rows[2]


def test_a_run_from_a_cache_trains_and_its_picture_finds_the_codebook(cfg, cache, tmp_path):
    from supmim_jax import visualize

    results = train(with_cache(cfg, cache), tmp_path, devices=ONE)
    again = train(cfg, tmp_path / "online", devices=ONE)
    assert results["top1"] == again["top1"] and results["knn"] == again["knn"]
    restored = visualize.restore(Checkpoint.open(str(tmp_path)))
    assert (restored.tokenizer.arrays["codes"] == np.load(cache / tokenizers.FILE)["codes"]).all()


def test_writing_goes_on_where_it_stopped_and_the_estimate_holds(cfg, caches, monkeypatch):
    directory = caches / "restarted"
    written = []
    write = token_cache.write_shard

    def failing(path, encoded):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, encoded)

    monkeypatch.setattr(token_cache, "write_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        cache_tokens.tokenize(cfg, directory, views=2, records_per_shard=40)
    before = {p.name: p.stat().mtime for p in directory.glob("tokens-*")}
    assert len(before) == 2
    monkeypatch.setattr(token_cache, "write_shard", write)
    plan = cache_tokens.tokenize(cfg, directory, views=2, records_per_shard=40)
    after = {p.name: p.stat().mtime for p in directory.glob("tokens-*")}
    assert len(after) == plan.shards == 4 and before.items() <= after.items()
    assert sum(p.stat().length for p in directory.glob("tokens-*")) <= cache_tokens.estimated_bytes(
        plan
    )
    whole = open_cache(with_cache(cfg, directory, 2))
    other = (
        open_cache(with_cache(cfg, caches / "three", 2)) if (caches / "three").exists() else whole
    )
    images = encoded_images(cfg)
    for v, i in itertools.product(range(2), range(64)):
        assert (whole.read(v, i, images[i]) == other.read(v, i, images[i])).all()


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
    a, b = (open_cache(with_cache(cfg, d)) for d in (cache, directory))
    images = encoded_images(cfg)
    for v, i in itertools.product(range(3), range(64)):
        assert (a.read(v, i, images[i]) == b.read(v, i, images[i])).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: dataclasses.replace(c, seed=5), r"tokens\.seed: 0; 5"),
        (lambda c: replaced(c, "data", flip=False), r"tokens\.augmentation\.flip: True; False"),
        (
            lambda c: replaced(c, "data", train_split="train[64:128]"),
            r"train_split: 'train\[:64\]'",
        ),
        (lambda c: replaced(c, "model", patch=5), r"tokens\.model\.patch: 4; 5"),
        (
            lambda c: replaced(
                c, "objective", target=dataclasses.replace(c.objective.target, codes=17)
            ),
            r"tokens\.tokenizer\.codes: 16; 17",
        ),
    ],
)
def test_a_cache_of_another_run_is_refused_naming_the_difference(cfg, cache, change, message):
    with pytest.raises(SetupError, match=message + ".*there; here"):
        Dataset.open(change(with_cache(cfg, cache)))


def test_crops_around_the_centre_have_a_cache_and_moving_ones_have_none(cfg, caches, monkeypatch):
    def around(boxes="centre", **changes):
        contrastive = ContrastiveCropConfig(boxes=boxes, **changes)
        return replaced(cfg, "data", crop="contrastive", contrastive_crop=contrastive)

    codes = make_frozen(cfg)
    monkeypatch.setattr(tokenizers, "open_tokenizer", lambda *_: codes["target"]["tokenizer"])
    directory = caches / "centre"
    cache_tokens.tokenize(around(), directory, views=3)
    one = sharding.make_mesh(cfg.mesh, ONE)
    online, tokens = steps(around(), one, codes)
    cached, same_tokens = steps(with_cache(around(), directory), one, codes)
    assert all((a == b).all() for a, b in zip(tokens, same_tokens, strict=True))
    np.testing.assert_allclose(cached, online, rtol=1e-6)
    with pytest.raises(SetupError, match=r"contrastive_crop\.alpha: 0\.6; 0\.1 .*there; here"):
        Dataset.open(with_cache(around(alpha=0.1), directory))
    Dataset.open(with_cache(around(threshold=0.5), directory))  # of other boxes
    for other in (replaced(cfg, "data", crop="inception"), cfg):
        with pytest.raises(SetupError, match=r"augmentation\.crop: 'contrastive'; '\w+'"):
            Dataset.open(with_cache(other, directory))
    with pytest.raises(ConfigError, match="boxes is 'heat_map', which moves the crops"):
        cache_tokens.tokenize(around("heat_map"), caches / "moving", views=3)
    assert not (caches / "moving").exists()


def test_a_cache_is_of_one_family_of_moving_operations(cfg):
    """A cache from before there were two of them names none: its crops were of neither."""

    def fingerprint(**changes):
        data = {"channels": 3, "crop": "inception", "augment_magnitude": 9.0} | changes
        return token_cache.fingerprint(replaced(cfg, "data", **data), "0" * 64, "1.0.0")

    augreg, timm = (fingerprint(augment=name) for name in ("rand_augment", "timm_rand_augment"))
    before = json.loads(json.dumps(augreg))
    del before["augmentation"]["augment"]
    directory = epath.Path("there")
    for stored in (before, timm, fingerprint(augment="rand_augment", crop="inception_tf")):
        with pytest.raises(SetupError, match=r"there .*tokens\.augmentation\.(augment|crop): "):
            token_cache.check_same(stored, augreg, directory)
    # What moves nothing is as it was: such caches stay valid.
    plain = fingerprint(augment="three_augment")
    assert plain["augmentation"]["rand_augment"] is False and "augment" not in plain["augmentation"]
    token_cache.check_same(fingerprint(augment="none"), plain, directory)


def test_a_cache_of_another_version_of_the_data_is_refused(cfg, cache, monkeypatch):
    opening = source_module.Source.__init__

    def patched(self, cfg):
        opening(self, cfg)
        self.version = "9.9.9"

    monkeypatch.setattr(source_module.Source, "__init__", patched)
    with pytest.raises(SetupError, match=r"tokens\.data\.version: '\d.*'; '9\.9\.9'"):
        Dataset.open(with_cache(cfg, cache))


def test_what_does_not_touch_the_tokens_may_differ(cfg, cache):
    other = replaced(with_cache(cfg, cache), "objective", mask_ratio=0.7)
    Dataset.open(replaced(other, "optim", lr=0.5))


def test_tokens_of_another_codebook_are_refused(cfg, cache, one_device, tmp_path):
    path = tmp_path / "codes.npz"
    np.savez(path, codes=np.zeros((16, 16), np.float32))
    target = dataclasses.replace(cfg.objective.target, path=str(path))
    other = replaced(with_cache(cfg, cache), "objective", target=target)
    with pytest.raises(SetupError, match="is not the tokenizer that made the token cache"):
        train(other, tmp_path / "run", devices=ONE)
    assert not (tmp_path / "run").exists()
    np.savez(path, codes=np.load(cache / tokenizers.FILE)["codes"])
    step_fn = train_step.TrainStep.build(other, one_device)
    tokenizers.Frozen.open(other, Dataset.open(other), epath.Path(tmp_path), step_fn)


def test_a_run_goes_on_without_its_cache_or_with_a_copy_but_not_with_other_tokens(
    cfg, cache, caches, tmp_path
):
    run = with_cache(cfg, cache)
    train(run, tmp_path / "run", stop_at=4, devices=ONE)
    copy = caches / "copy"
    copy.mkdir()
    for path in cache.iterdir():
        path.copy(copy / path.name)
    train(with_cache(cfg, copy), tmp_path / "run", stop_at=6, devices=ONE)
    codes = dataclasses.replace(cfg.objective.target, path=str(cache / tokenizers.FILE))
    train(replaced(cfg, "objective", target=codes), tmp_path / "run", stop_at=8, devices=ONE)
    other = tmp_path / "codes.npz"
    np.savez(other, codes=np.load(cache / tokenizers.FILE)["codes"] + 0.01)
    codes = dataclasses.replace(cfg.objective.target, path=str(other))
    with pytest.raises(SetupError, match=r"holds a run with the tokenizer of SHA-256 \w{12}\.\.\."):
        train(replaced(cfg, "objective", target=codes), tmp_path / "run", devices=ONE)


def test_too_few_views_are_refused(cfg, cache):
    with pytest.raises(
        SetupError, match=r"3 views .* wants 9\. Set config.tokens.views=3 to cycle"
    ):
        Dataset.open(with_cache(dataclasses.replace(cfg, epochs=9), cache))


def test_damage_is_named(cfg, cache, tmp_path):
    def copied(name):
        directory = epath.Path(tmp_path) / name
        directory.mkdir()
        for path in cache.iterdir():
            path.copy(directory / path.name)
        return directory, directory / "tokens-00002-of-00004.arrayrecord"

    directory, shard = copied("missing")
    shard.unlink()
    with pytest.raises(SetupError, match=r"lacks 1 of 4 shards: tokens-00002-of-00004"):
        Dataset.open(with_cache(cfg, directory))
    for cut in (1000, 70_000):
        directory, shard = copied(f"cut{cut}")
        shard.write_bytes(shard.read_bytes()[:cut])
        with pytest.raises(
            SetupError, match=r"damaged: tokens-00002-of-00004.arrayrecord (is cut|has 0)"
        ):
            Dataset.open(with_cache(cfg, directory))
    directory, shard = copied("fewer")
    token_cache.write_shard(shard, iter([bytes(54)] * 7))
    with pytest.raises(SetupError, match=r"tokens-00002.* has 7 records, expected 50"):
        Dataset.open(with_cache(cfg, directory))
    directory, shard = copied("zeros")
    token_cache.write_shard(shard, iter([bytes(54)] * 50))
    opened, images = open_cache(with_cache(cfg, directory)), encoded_images(cfg)
    with pytest.raises(SetupError, match=r"00002.*view 1 of example 40 has a wrong checksum"):
        opened.read(1, 40, images[40])
    directory, _ = copied("manifest")
    (directory / token_cache.MANIFEST).write_text("{")
    with pytest.raises(SetupError, match=r"manifest\.json cannot be read"):
        Dataset.open(with_cache(cfg, directory))
    with pytest.raises(SetupError, match=r"There is no token cache in .*nowhere"):
        Dataset.open(with_cache(cfg, tmp_path / "nowhere"))


def test_tokens_are_those_of_the_image_that_was_tokenised(cfg, cache):
    """Data sets without seals may have changed unseen; their records' tokens then don't fit."""
    opened, images = open_cache(with_cache(cfg, cache)), encoded_images(cfg)
    opened.read(2, 5, images[5])
    for wrong in (images[6], images[5][:-1], images[5] + b"x", b""):
        with pytest.raises(
            SetupError, match=r"view 2 of example 5 .* image of record 5 is no longer"
        ):
            opened.read(2, 5, wrong)


@pytest.mark.parametrize(
    "change", [{"views": 2}, {"records_per_shard": 49}, {"codes": 15}, {"x": 1}]
)
def test_a_manifest_that_was_changed_is_refused(cfg, cache, tmp_path, change):
    values = json.loads((cache / token_cache.MANIFEST).read_text())
    (tmp_path / token_cache.MANIFEST).write_text(json.dumps(values | change))
    with pytest.raises(SetupError, match=r"manifest\.json cannot be read: its checksum is wrong"):
        Dataset.open(with_cache(cfg, tmp_path))
    del values["sha256"]
    (tmp_path / token_cache.MANIFEST).write_text(json.dumps(values))
    with pytest.raises(SetupError, match=r"it has no checksum, as those of earlier versions"):
        Dataset.open(with_cache(cfg, tmp_path))


def test_a_records_checksum_is_of_all_that_it_belongs_to():
    """Of the cache, the place in it (views of an image have one mark), the image and the ids."""
    given = (bytes(32), 5, 7, b"ids")
    others = [(bytes(31) + b"x", 5, 7, b"ids"), (bytes(32), 6, 7, b"ids")]
    others += [(bytes(32), 5, 8, b"ids"), (bytes(32), 5, 7, b"idt")]
    assert len({token_cache._checksum(*x) for x in (given, *others)}) == 5


def test_a_codebook_that_took_the_place_of_the_caches_is_refused(cfg, cache, tmp_path):
    for path in cache.iterdir():
        path.copy(epath.Path(tmp_path) / path.name)
    np.savez(tmp_path / tokenizers.FILE, codes=np.load(cache / tokenizers.FILE)["codes"] + 1)
    with pytest.raises(
        SetupError, match=r"tokenizer\.npz is not the tokenizer that made the token cache"
    ):
        other = with_cache(cfg, tmp_path)
        tokenizers.open_tokenizer(other, Dataset.open(other), epath.Path(tmp_path), {})


def test_a_cache_in_use_is_not_written_over(cfg, cache):
    before = json.loads((cache / token_cache.MANIFEST).read_text())
    with pytest.raises(SetupError, match=r"has 3 views in shards of 50; asked for are 4"):
        cache_tokens.tokenize(cfg, cache, views=4, records_per_shard=50)
    with pytest.raises(SetupError, match=r"tokens\.seed: 0; 1"):
        cache_tokens.tokenize(
            dataclasses.replace(cfg, seed=1), cache, views=3, records_per_shard=50
        )
    assert json.loads((cache / token_cache.MANIFEST).read_text()) == before


def test_a_run_without_tokens_has_no_cache(supervised, tmp_path):
    with pytest.raises(ConfigError, match="no image tokens"):
        cache_tokens.tokenize(supervised, epath.Path(tmp_path), views=1)
    with pytest.raises(ConfigError, match="predicts no tokens"):
        with_cache(supervised, tmp_path)


def test_a_disk_that_is_too_small_is_reported_before_anything_is_written(
    cfg, tmp_path, monkeypatch
):
    monkeypatch.setattr(storage, "free_bytes", lambda _: 1000)
    with pytest.raises(SetupError, match=r"no room for the whole cache: 1000 bytes"):
        cache_tokens.tokenize(cfg, epath.Path(tmp_path) / "cache", views=3)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_mesh_reads_the_tokens_that_one_device_reads(cfg, cache, one_device):
    cached = with_cache(cfg, cache)
    mesh = sharding.make_mesh(dataclasses.replace(cfg.mesh, fsdp=2))
    for a, b in zip(*(Dataset.open(cached).train(m) for m in (one_device, mesh)), strict=True):
        assert (np.asarray(a.tokens) == np.asarray(b.tokens)).all()


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
    images = encoded_images(cfg)
    new, opened = (open_cache(with_cache(cfg, d)) for d in (cache, old))
    for i in (0, 40, 63):
        assert (opened.read(1, i, images[i]) == new.read(1, i, images[i])).all()
    rgba = np.zeros((8, 8, 4), np.uint8)
    for image in (rgba, rgba[..., :1].astype(np.uint16)):
        with pytest.raises(SetupError, match=r"old.*example 3.*cache_tokens"):
            opened.read(1, 3, cv2.imencode(".png", image)[1].tobytes())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"background": (0, 0, 0)}, r"shown\.background"),
        ({"max_value": 255.0}, r"shown\.max_value"),
    ],
)
def test_a_cache_is_of_images_as_they_are_shown(cfg, cache, change, named):
    with pytest.raises(SetupError, match=named):
        open_cache(with_cache(replaced(cfg, "data", **change), cache))


def test_a_cache_of_many_shards_has_few_open_and_outlives_a_system_error(cfg, cache, monkeypatch):
    images = encoded_images(cfg)
    opened = open_cache(with_cache(cfg, cache))
    monkeypatch.setattr(source_module, "most_open", lambda: 1)
    wanted = [opened.read(view, 5, images[5]) for view in (0, 1, 2)]
    assert len(opened.readers.open) == 1

    class Failing:
        def __init__(self, *given, **options):
            pass

        def read(self, positions):
            raise RuntimeError("open() failed: Too many open files; opening x")

    with monkeypatch.context() as patch:
        patch.setattr(source_module.array_record_module, "ArrayRecordReader", Failing)
        with pytest.raises(SetupError, match=r"tokens-00000-of-00004.*ulimit"):
            opened.read(0, 5, images[5])
    assert (opened.read(0, 5, images[5]) == wanted[0]).all()
