"""Where runs and data are: the one door that every path of a user goes through."""

import ast
import pwd
from pathlib import Path

import pytest
from conftest import ONE, REPOSITORY
from etils import epath

from supmim_jax import checkpoint, storage
from supmim_jax.config import CheckpointConfig, Config, DataConfig
from supmim_jax.config.configdict import from_configdict, to_configdict
from supmim_jax.errors import SetupError
from supmim_jax.train import train

REFUSED = [
    *("s3://bucket/run", "az://container/run", "hdfs://host/run", "abfss://c@a.x/run"),
    *("S3://bucket/run", "http://host/run", "gs:/bucket/run", "s3:/bucket/run"),
    *("gs://", "gs:///run", "gs://bucket/a/../../run", "file://host/run"),
    *("/gs/bucket/run", "/s3/run", "~nobody_of_this_name/run"),
    *("runs/lr[1]", "gs://bucket/run*", "runs/what?"),
]


@pytest.mark.parametrize("text", REFUSED)
def test_a_place_where_nothing_can_be_kept_is_refused_at_the_door(text):
    for enter in (
        storage.location,
        checkpoint.steps,
        lambda path: checkpoint.Checkpoints(path, CheckpointConfig()),
        lambda path: from_configdict({"data": {"data_dir": path}}),
    ):
        with pytest.raises(SetupError) as error:
            enter(text)
        assert text in str(error.value)


def test_an_empty_path_is_no_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for enter in (storage.location, checkpoint.steps, storage.PathParser(True).parse):
        with pytest.raises((SetupError, ValueError), match="empty"):
            enter("")
    assert storage.PathParser(True, may_be_empty=True).parse("") == ""


def test_paths_are_absolute_and_gs_stays_gs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/x")
    for given, expected in {
        "run": f"{tmp_path}/run",
        "./a/../b/": f"{tmp_path}/b",
        "~/run": "/home/x/run",
        "file:///data/x": "/data/x",
        "gs://bucket/a//b/": "gs://bucket/a/b",
        "gs://bucket": "gs://bucket",
        "runs/x@best": f"{tmp_path}/runs/x@best",
    }.items():
        assert str(storage.location(given)) == expected
    assert storage.location(epath.Path("gs://bucket/x")) == epath.Path("gs://bucket/x")


def test_a_config_means_the_same_path_from_every_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    stored = to_configdict(Config(data=DataConfig(data_dir="data"))).to_dict()
    monkeypatch.chdir("/")
    assert from_configdict(stored).data.data_dir == f"{tmp_path}/data"
    assert from_configdict({}).data.data_dir == ""  # tfds's own


def test_every_flag_with_a_path_goes_through_the_door():
    """A new command is reminded: its paths are `storage.define`'s."""
    paths = {"workdir", "checkpoint", "out", "cache", "data_dir", "manual_dir", "image_folder"}
    paths |= {"from_tfrecord", "path", "json"}
    for file in Path(REPOSITORY, "supmim_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and "DEFINE" in ast.unparse(node.func):
                name = node.args[0].value if isinstance(node.args[0], ast.Constant) else ""
                assert name not in paths, (file, name)


def test_files_appear_whole(tmp_path):
    path = epath.Path(tmp_path / "x.json")
    storage.write(path, "1")
    storage.write(path, b"22")
    assert path.read_text() == "22"
    with pytest.raises(RuntimeError), storage.written(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert path.read_text() == "22"
    with pytest.raises(RuntimeError), storage.made(epath.Path(tmp_path / "d"), "last") as part:
        (part / "x").write_text("half")
        raise RuntimeError
    assert not (tmp_path / "d").exists() and len(list(tmp_path.iterdir())) <= 2
    with storage.made(epath.Path(tmp_path / "d"), "last") as part:
        (part / "x").write_text("1")
    assert list(storage.files(epath.Path(tmp_path / "d"))) == ["x"]


def test_a_user_without_a_name_trains_and_goes_on(cfg, tmp_path, monkeypatch):
    """As in a container that runs under any uid: the system knows no name for it."""

    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    train(cfg, tmp_path, stop_at=2, devices=ONE)
    train(cfg, tmp_path, stop_at=4, devices=ONE)
    assert checkpoint.steps(tmp_path)[-1] == 4
