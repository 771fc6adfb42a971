"""The life of a run in a bucket, gs:// as an emulator on this machine serves it (gcs.py)."""

import http.server
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from conftest import FAST, ONE, REPOSITORY, make_photos, metric_lines, python, train_command
from etils import epath
from test_processes import ended, places, started

from supmim_jax import cache_tokens, checkpoint, export, import_weights, probe, storage
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import Config, InitConfig, TokensConfig, changed
from supmim_jax.data.prepare import folder
from supmim_jax.errors import SetupError
from supmim_jax.report import __main__ as report
from supmim_jax.train import train

pytestmark = pytest.mark.usefixtures("build_once")


@pytest.fixture
def here(bucket, tmp_path) -> epath.Path:
    """A place in the bucket that no other test uses."""
    return epath.Path(bucket) / tmp_path.name


@pytest.fixture(scope="module")
def beasts(cfg, bucket, tmp_path_factory) -> Config:
    """A run on a folder of images that was prepared in the bucket, with tokens from a cache there.

    It has nine steps and a checkpoint after every second, of which two stay.
    """
    photos, root = make_photos(tmp_path_factory.mktemp("photos")), epath.Path(bucket) / "beasts"
    said = folder.prepare(epath.Path(photos), "beasts", str(root / "data"))
    again = folder.prepare(epath.Path(photos), "beasts", str(root / "data"))
    assert "beasts" in said and "Prepared already" in again
    data = {"name": "beasts", "data_dir": str(root / "data"), "num_classes": 3, "channels": 3}
    data |= {"train_split": "train", "train_examples": 36, "crop": "inception"}
    cfg = changed(cfg, batch_size=12, data=data, checkpoint={"every": 2, "keep": 2})
    for _ in range(2):  # the second finds all shards there
        cache_tokens.tokenize(cfg, root / "tokens", views=3, records_per_shard=40)
    return changed(cfg, tokens=TokensConfig(cache=str(root / "tokens")))


def test_the_life_of_a_run(beasts, here, tmp_path):
    run = str(here / "run")
    results = train(beasts, run, devices=ONE)
    assert checkpoint.steps(run) == [8, 9]
    on_disk = train(beasts, tmp_path / "run", devices=ONE)
    assert results.items() >= {(k, v) for k, v in on_disk.items() if k != "seconds"}
    assert metric_lines(run) == metric_lines(tmp_path / "run")

    assert probe.probe(Checkpoint.open(run), devices=ONE).results.metrics["knn"] == results["knn"]
    export.export(run, "timm", here / "exported")
    export.export(run, "timm", tmp_path / "exported")
    for name, path in storage.files(tmp_path / "exported").items():
        assert (here / "exported" / name).read_bytes() == path.read_bytes()
    with pytest.raises(SetupError, match="already exists"):
        export.export(run, "timm", here / "exported")
    with storage.fetched(here / "exported") as local:
        base = changed(beasts, tokens=TokensConfig())
        imported = import_weights.load("timm", local, base)
        import_weights.save(here / "imported", *imported)
    probed = probe.probe(Checkpoint.open(str(here / "imported")), devices=ONE).results
    assert probed.metrics["knn"] == results["knn"]
    assert report.write(run) == epath.Path(run) / "report.html"
    assert (epath.Path(run) / "report.html").read_text().startswith("<!doctype html>")
    begun = changed(beasts, init=InitConfig(checkpoint=f"{run}@8"))
    assert train(begun, here / "started", stop_at=1, devices=ONE) == {}
    assert checkpoint.steps(here / "started") == [1]


def test_a_run_that_was_copied_into_a_bucket_goes_on_there(beasts, here, tmp_path):
    train(beasts, tmp_path / "run", stop_at=4, devices=ONE)
    for name, path in storage.files(tmp_path / "run").items():
        storage.upload(path, here / "run" / name)
    results = train(beasts, here / "run", devices=ONE)
    assert checkpoint.steps(here / "run") == [8, 9]
    assert results["knn"] == train(beasts, tmp_path / "run", devices=ONE)["knn"]


def test_a_checkpoint_that_was_damaged_in_a_bucket_is_set_aside(beasts, here):
    run = here / "run"
    train(beasts, run, stop_at=4, devices=ONE)
    name, path = next(iter(storage.files(run / "checkpoints" / "4" / "state" / "d").items()))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(SetupError, match=name):
        train(beasts, run, devices=ONE)
    train(beasts, run, stop_at=5, devices=ONE, use_older_checkpoint=True)
    assert checkpoint.steps(run) == [4, 5] and (run / "checkpoints" / "4.damaged").is_dir()


def test_a_save_that_was_killed_in_a_bucket_is_removed_and_does_not_count(beasts, here):
    run = here / "run"
    train(beasts, run, stop_at=2, devices=ONE)
    half = run / "checkpoints" / "4"
    saved = storage.files(run / "checkpoints" / "2")
    written = [storage.stat(saved[x]).mtime for x in ("SHA256SUMS", "commit_success.txt")]
    assert written == sorted(written)  # the commit comes last
    for name, path in saved.items():
        if name != "commit_success.txt":
            path.copy(half / name)
    assert checkpoint.steps(run) == [2]
    checkpoint.Checkpoints(run, beasts.checkpoint)
    assert not half.exists()


def test_a_bucket_that_is_not_there_is_named_before_anything_is_made(cfg, bucket, tmp_path):
    absent = "gs://no_such_bucket/run"
    for begin in (
        lambda: train(cfg, absent, devices=ONE),
        lambda: cache_tokens.tokenize(cfg, epath.Path(absent), views=1),
        lambda: checkpoint.locate(absent),
    ):
        with pytest.raises(SetupError, match=r"gs://no_such_bucket"):
            begin()


def test_a_bucket_that_refuses_is_for_a_person_to_mend(tmp_path):
    """Exit code 2: a launcher would start again and again."""

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = b'{"error": {"code": 403, "message": "no access to storage.objects.get"}}'
            self.send_response(403)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        names = "STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"
        env = os.environ | dict.fromkeys(names, url) | {"NO_GCE_CHECK": "true"}
        run = ["-m", "supmim_jax.probe", "--checkpoint=gs://bucket/run"]
        (process,) = ended(started([run], env=env), within=60)
        server.shutdown()
    assert process.code == 2 and "storage.objects.get" in process.err
    assert "Traceback" not in process.err.rpartition("error: ")[2]


def test_a_bucket_that_cannot_be_seen_for_a_moment_is_no_empty_one(beasts, here, monkeypatch):
    """Or a run that is started again in that moment would begin anew."""
    import gcsfs

    async def failing(*args, **kwargs):
        raise ConnectionResetError("for a moment")

    train(beasts, here / "run", stop_at=2, devices=ONE)
    with monkeypatch.context() as now:
        now.setattr(gcsfs.GCSFileSystem, "_call", failing)
        for look in (checkpoint.steps, checkpoint.locate):
            with pytest.raises(ConnectionResetError):
                look(str(here / "run"))
        with pytest.raises(SetupError) as error:
            train(beasts, here / "run", devices=ONE)
        assert storage.may_pass(error.value.__context__)  # and so the command exits with 1
    assert checkpoint.steps(here / "run") == [2]


def test_what_is_uploaded_is_compared(here, tmp_path, monkeypatch):
    """A transfer that changes a byte is no shard."""
    import gcsfs

    path = epath.Path(tmp_path / "x")
    path.write_text("records")
    storage.upload(path, here / "x")
    assert (here / "x").read_text() == "records"

    real = gcsfs.checkers.MD5Checker.validate_json_response

    def other(self, response):
        real(self, response | {"md5Hash": "AAAAAAAAAAAAAAAAAAAAAA=="})

    monkeypatch.setattr(gcsfs.checkers.MD5Checker, "validate_json_response", other)
    with pytest.raises(OSError, match="x was not stored"):
        storage.upload(path, here / "x")


def test_two_processes_train_in_a_bucket_and_go_on(data_dir, here, tmp_path):
    """From another clone, in another directory, after a kill."""
    flags = "--config.batch_size=24", "--config.checkpoint.every=4", "--config.epochs=2"
    clone = tmp_path / "clone"
    shutil.copytree(Path(REPOSITORY, "supmim_jax"), clone / "supmim_jax")
    shutil.copytree(Path(REPOSITORY, "configs"), clone / "configs")
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": FAST, "PYTHONPATH": ""}
    run = train_command(here / "run", data_dir, *flags)
    first = started([[*run, *place] for place in places(2)], env=env)
    try:
        while 4 not in checkpoint.steps(here / "run"):
            assert all(process.poll() is None for process in first)
            time.sleep(0.3)
    finally:
        for process in first:
            process.kill()
    second = started([[*run, *place] for place in places(2)], [clone] * 2, env=env)
    for process in ended(second):
        assert process.code == 0, process.err
    assert checkpoint.steps(here / "run")[-1] == 20
    assert (here / "run" / "results.json").exists()


@pytest.mark.slow
def test_each_command_of_the_readme_in_a_bucket(photos, here, tmp_path):
    """From a directory that is not the checkout; the tests above call what they call."""

    def command(name: str, *flags: str) -> str:
        out = python("-m", f"supmim_jax.{name}", *flags, cwd=tmp_path)
        assert out.returncode == 0, out.stderr
        return out.stdout

    run, config = here / "run", f"--config={REPOSITORY}/configs/debug.py"
    prepare = f"--image_folder={photos}", "--as=beasts", f"--data_dir={here / 'data'}"
    assert "Nothing was written" in command("data.prepare", *prepare, "--dry_run")
    command("data.prepare", *prepare)
    data = {"name": "beasts", "data_dir": here / "data", "num_classes": 3, "channels": 3}
    data |= {"train_split": "train", "train_examples": 36, "eval_split": "validation"}
    overrides = [f"--config.data.{name}={value}" for name, value in data.items()]
    overrides += ["--config.batch_size=12", "--config.epochs=3", "--config.eval.batch_size=9"]
    overrides += ["--config.checkpoint.every=3", "--config.checkpoint.keep=2"]
    overrides += ["--config.objective.target.fit_images=36", "--config.objective.target.codes=16"]
    command("cache_tokens", config, *overrides, "--epochs=3", f"--cache={here / 'tokens'}")
    overrides += [f"--config.tokens.cache={here / 'tokens'}"]
    train = "train", config, *overrides
    command(*train, f"--workdir={run}")
    assert json.loads((run / "results.json").read_text())["objective"] == "supmim"
    assert "| run@9" in command("probe", f"--checkpoint={run}")
    assert (run / "evals" / "run-9.json").exists()
    command("export", f"--checkpoint={run}@9", "--to=transformers", f"--out={here / 'exported'}")
    command("report", f"--checkpoint={run}")
    command("visualize", f"--checkpoint={run}")
    assert (run / "tokens.png").read_bytes().startswith(b"\x89PNG")
    command(*train, f"--workdir={here / 'second'}", f"--config.init.checkpoint={run}")
