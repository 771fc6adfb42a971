"""The command that prepares data: shards, restarts, flags."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import tensorflow_datasets as tfds
from conftest import REPOSITORY, python
from etils import epath
from pictures import contents, encoded, put, source

from supmim_jax import storage
from supmim_jax.data import worker
from supmim_jax.data.prepare import __main__ as command
from supmim_jax.data.prepare import catalogue, folder, output, tfrecords
from supmim_jax.errors import SetupError


@pytest.fixture(params=["folder", "tfrecords"])
def form(request, photos, toy, monkeypatch):
    """A form of the command: its module, source, name and version; it writes shards of five."""
    monkeypatch.setattr(output, "RECORDS_PER_SHARD", 5)
    if request.param == "folder":
        return folder, epath.Path(photos), ["beasts"], "beasts/1.0.0"
    return tfrecords, toy, [], "toy_pictures/2.3.4"


def test_shards_are_cut_by_bytes_and_by_records(monkeypatch):
    monkeypatch.setattr(output, "RECORDS_PER_SHARD", 4)
    monkeypatch.setattr(output, "BYTES_PER_SHARD", 100)
    cut = output.cut([50, 50, 1, 1, 1, 1, 1, 300, 99, 2])
    assert [list(part) for part in cut] == [[0, 1], [2, 3, 4, 5], [6], [7], [8], [9]]


def test_a_disk_that_is_too_small_is_refused_before_writing(form, tmp_path, monkeypatch):
    module, origin, name, version = form
    monkeypatch.setattr(storage, "free_bytes", lambda _: 1000)
    data = str(tmp_path / "data")
    with pytest.raises(SetupError, match=rf"{version} .*1000 bytes .* free.*--data_dir"):
        module.prepare(origin, *name, data)
    assert "NOT ENOUGH" in module.prepare(origin, *name, data, dry_run=True)
    assert not (tmp_path / "data").exists()


def test_the_estimate_of_bytes_holds(form, tmp_path, monkeypatch):
    module, origin, name, _ = form
    needed = []
    monkeypatch.setattr(storage, "check_disk_space", lambda _, size, *rest: needed.append(size))
    module.prepare(origin, *name, str(tmp_path / "data"))
    written = [path.stat().st_size for path in (tmp_path / "data").rglob("*array_record-*")]
    assert sum(written) <= needed[0] <= sum(written) + len(written) * (5 * 250 + 2**17)


def test_too_few_or_too_many_records_are_no_shard(tmp_path):
    def write(name: str, count: int, records: list[bytes]) -> None:
        shard = output.Shard(name, count, 0, lambda: iter(records))
        output.write_shard(epath.Path(tmp_path) / name, shard, output.progress("", 0, ""))

    for count in (2, 4):
        with pytest.raises(SetupError, match=f"3 records, expected {count}"):
            write("x", count, [b"a"] * 3)
    (tmp_path / "full.part").symlink_to("/dev/full")
    with pytest.raises(SetupError, match=r"No space left"):
        write("full", 1, [b"a" * 100])
    assert not (tmp_path / "x").exists() and not (tmp_path / "full").exists()


def test_reading_ahead_keeps_order_and_is_bounded():
    seen, lock = [], threading.Lock()

    def make(item):
        time.sleep(0.001 * (item % 3))
        with lock:
            seen.append(item)
        return item * 2

    results = worker.prefetched(make, range(1000))
    assert [next(results) for _ in range(10)] == list(range(0, 20, 2))
    time.sleep(0.1)
    assert len(seen) <= 10 + 4 * min(8, os.cpu_count())
    assert list(results) == list(range(20, 2000, 2))


SLOWLY = """
import importlib, sys, time
from etils import epath
from supmim_jax.data.prepare import output
class Slow(output.tqdm):
    def update(self, n=1):
        time.sleep(0.03)
        return super().update(n)
output.RECORDS_PER_SHARD, output.tqdm = 5, Slow
module, source, *rest = sys.argv[1:]
importlib.import_module(module).prepare(epath.Path(source), *rest)
"""


def test_killed_in_a_shard_and_started_again_the_data_are_the_same(form, tmp_path):
    module, origin, name, version = form
    part = tmp_path / "killed" / f"{version}{output.UNFINISHED}"
    run = [sys.executable, "-c", SLOWLY, module.__name__, str(origin), *name]
    process = subprocess.Popen(
        [*run, str(tmp_path / "killed")], cwd=REPOSITORY, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while True:  # until it stands still in the middle of a shard
        assert process.poll() is None and time.monotonic() < deadline
        if len(list(part.glob("*.array_record-*[0-9]"))) >= 3:
            process.send_signal(signal.SIGSTOP)
            if list(part.glob("*.part")):
                break
            process.send_signal(signal.SIGCONT)
        time.sleep(0.005)
    process.kill()
    process.wait()
    written = {p.name: p.stat().st_mtime_ns for p in part.glob("*.array_record-*[0-9]")}
    assert not (tmp_path / "killed" / version).exists()
    with pytest.raises(tfds.core.DatasetNotFoundError):
        tfds.core.read_only_builder.builder_from_files(
            version.partition("/")[0], data_dir=tmp_path / "killed"
        )
    for directory in ("killed", "whole"):
        module.prepare(origin, *name, str(tmp_path / directory))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed" / version).iterdir()}
    assert written.items() <= times.items()
    assert not any(name.endswith(".part") or name == output.LOCK for name in times)


@pytest.mark.parametrize("what", ["folder", "catalogue"])
def test_killed_while_it_is_copied_in_a_bucket_the_command_goes_on(
    photos, bucket, tmp_path, monkeypatch, what
):
    data = f"{bucket}/{tmp_path.name}"

    def prepare():
        if what == "catalogue":
            return catalogue.prepare("toy_pictures", data, "")
        return folder.prepare(epath.Path(photos), "beasts", data)

    def half(last, names, do):
        list(map(do, [name for name in names if name != last][1:]))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(storage, "_with_last", half)
        prepare()
    assert "train_examples" in prepare()
    name, count = {"folder": ("beasts", 36), "catalogue": ("toy_pictures", 23)}[what]
    assert len(source(data, name)) == count


@pytest.mark.parametrize("changed", [True, False])
def test_after_a_stop_a_changed_folder_is_begun_anew_and_the_same_not_checked_again(
    photos, tmp_path, monkeypatch, changed
):
    monkeypatch.setattr(output, "RECORDS_PER_SHARD", 5)
    prepare = lambda: folder.prepare(epath.Path(photos), "beasts", str(tmp_path / "data"))  # noqa: E731
    write_shard = output.write_shard

    def stop(path, *rest):
        if "-00003-of-" in path.name:
            raise KeyboardInterrupt
        write_shard(path, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(output, "write_shard", stop)
        prepare()
    if changed:
        put(photos / "train/ape/0000.png", encoded(77))
    else:
        monkeypatch.setattr(folder, "find_broken", lambda *_: 1 / 0)
    prepare()
    assert "Prepared already" in prepare()
    records = source(tmp_path / "data")
    assert len(records) == 36 + changed
    assert (records[0]["image"] == encoded(77)) == changed


def test_two_commands_do_not_write_to_one_place(tmp_path):
    final, made_of = epath.Path(tmp_path) / "x" / "1.0.0", {"source": "s", "fingerprint": "f"}
    with output.writing(final, made_of):
        second = output.writing(final, made_of)
        with pytest.raises(SetupError, match="Another process is writing to"):
            second.__enter__()
        assert not final.exists()
    assert final.exists()


def test_a_dry_run_writes_nothing(form, tmp_path):
    module, origin, name, version = form
    before, data = contents(tmp_path), str(tmp_path / "data")
    plan = module.prepare(origin, *name, data, dry_run=True)
    assert f"Would write {data}/{version}" in plan and "(enough)" in plan
    for count in ("36 records", "9 records") if name else ("23 records", "7 records"):
        assert count in plan
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, r"--name, --from_tfrecord, --image_folder; found none"),
        ({"name": "x", "image_folder": "y"}, r"found --name, --image_folder"),
        ({"name": "x", "val_fraction": 0.1}, r"--val_fraction belongs to --image_folder"),
        ({"image_folder": "x", "as": "y", "verify": True}, r"--verify belongs to --name"),
        ({"image_folder": "x"}, r"--as"),
    ],
)
def test_flags_of_two_forms_are_refused(flags, message):
    values = dict.fromkeys([*command.FORMS, *sum(command.FORMS.values(), ())], "")
    with pytest.raises(SetupError, match=message):
        command.check_flags(values | flags)


def test_the_command_prints_the_overrides_and_fails_with_a_paragraph(photos, tmp_path):
    def run(data_dir, *more):
        arguments = [f"--image_folder={photos}", "--as=beasts", f"--data_dir={data_dir}", *more]
        return python("-m", "supmim_jax.data.prepare", *arguments)

    put(tmp_path / "file")
    for data_dir, flag, named in (
        (tmp_path / "data", "--val_fraction=0.5", "--val_fraction is 0.5"),
        (tmp_path / "file", "--skip_broken", str(tmp_path / "file")),
    ):
        out = run(data_dir, flag)
        assert out.returncode == 2 and "Traceback" not in out.stderr and named in out.stderr
    out = run(tmp_path / "data")
    assert out.returncode == 0 and "--config.data.train_examples=36" in out.stdout
    lines = out.stderr.splitlines()
    assert "checking: 100%" in out.stderr and "writing: 100%" in out.stderr
    assert all("\r" not in line and line.strip() for line in lines) and len(lines) <= 6
