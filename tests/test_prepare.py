"""The command that prepares data: shards, restarts, flags."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import tensorflow_datasets as tfds
from conftest import REPOSITORY
from etils import epath
from pictures import contents, encoded, put, source

from supmim_jax import storage
from supmim_jax.data.prepare import __main__ as command
from supmim_jax.data.prepare import folder, shards, tfrecords
from supmim_jax.errors import SetupError


def test_shards_are_cut_by_bytes_and_by_records(monkeypatch):
    monkeypatch.setattr(shards, "RECORDS_PER_SHARD", 4)
    monkeypatch.setattr(shards, "BYTES_PER_SHARD", 100)
    sizes = [50, 50, 1, 1, 1, 1, 1, 300, 99, 2]
    cut = shards.cut(sizes)
    assert [list(part) for part in cut] == [[0, 1], [2, 3, 4, 5], [6], [7], [8], [9]]


def test_the_estimate_of_bytes_holds(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "RECORDS_PER_SHARD", 5)
    sizes = []
    check = shards.check_space
    monkeypatch.setattr(shards, "check_space", lambda p, n: (sizes.append(n), check(p, n)))
    folder.prepare(epath.Path(photos), "beasts", str(tmp_path / "data"))
    written = sum(p.stat().st_size for p in (tmp_path / "data").rglob("*array_record-*"))
    assert written <= sizes[0] <= written + 10 * (5 * 250 + 2**17)


def test_a_disk_that_is_too_small_is_refused_before_writing(photos, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "free_bytes", lambda _: 1000)
    with pytest.raises(SetupError, match=r"1\.0\.0 needs 0\.\d MB, and its disk has 0\.0 MB free"):
        folder.prepare(epath.Path(photos), "beasts", str(tmp_path / "data"))
    with pytest.raises(SetupError, match=r"2\.3\.4 needs 1\.\d MB, and its disk has 0\.0 MB free"):
        tfrecords.prepare(toy, str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()
    said = folder.prepare(epath.Path(photos), "beasts", str(tmp_path / "data"), dry_run=True)
    assert "NOT ENOUGH" in said


def test_too_few_or_too_many_records_are_no_shard(tmp_path):
    for count in (2, 4):
        with pytest.raises(SetupError, match=f"would have 3 records, expected {count}"):
            shards.write(epath.Path(tmp_path) / "x", count, iter([b"a"] * 3))
    with pytest.raises(SetupError, match=r"cannot be written: .*No space left"):
        (tmp_path / "full.part").symlink_to("/dev/full")
        shards.write(epath.Path(tmp_path) / "full", 1, iter([b"a" * 100]))
    assert not (tmp_path / "x").exists() and not (tmp_path / "full").exists()


def test_reading_ahead_keeps_order_and_is_bounded():
    seen, lock = [], threading.Lock()

    def make(item):
        time.sleep(0.001 * (item % 3))
        with lock:
            seen.append(item)
        return item * 2

    found = shards.ahead(make, range(1000))
    assert [next(found) for _ in range(10)] == list(range(0, 20, 2))
    time.sleep(0.1)
    assert len(seen) <= 10 + 4 * min(8, os.cpu_count())
    assert list(found) == list(range(20, 2000, 2))


SLOWLY = """
import sys, time
from etils import epath
from supmim_jax.data.prepare import folder, shards, tfrecords
shards.RECORDS_PER_SHARD = 5
whole = shards.progress.counted
def slow(items, bar):
    for item in whole(items, bar):
        time.sleep(0.03)
        yield item
shards.progress.counted = slow
module, source, *rest = sys.argv[1:]
{"folder": folder, "tfrecords": tfrecords}[module].prepare(epath.Path(source), *rest)
"""


@pytest.mark.parametrize("kind", ["folder", "tfrecords"])
def test_killed_in_a_shard_and_started_again_the_data_are_the_same(
    kind, photos, toy, tmp_path, monkeypatch
):
    monkeypatch.setattr(shards, "RECORDS_PER_SHARD", 5)
    if kind == "folder":
        origin, rest, version, name = photos, ["beasts"], "beasts/1.0.0", "beasts"
        prepare = lambda where: folder.prepare(epath.Path(photos), "beasts", str(where))  # noqa
    else:
        origin, rest, version, name = toy, [], "toy_pictures/2.3.4", "toy_pictures"
        prepare = lambda where: tfrecords.prepare(toy, str(where))  # noqa
    part = tmp_path / "killed" / f"{version}{shards.UNFINISHED}"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, kind, str(origin), *rest, str(tmp_path / "killed")],
        cwd=REPOSITORY,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
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
    assert 3 <= len(written) < 8 and list(part.glob("*.part"))
    assert not (tmp_path / "killed" / version).exists()
    with pytest.raises(tfds.core.DatasetNotFoundError):
        tfds.core.read_only_builder.builder_from_files(name, data_dir=tmp_path / "killed")
    prepare(tmp_path / "killed")
    prepare(tmp_path / "whole")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed" / version).iterdir()}
    assert written.items() <= kept.items()
    listed = {p.name for p in (tmp_path / "whole" / version).iterdir()}
    assert not any(n.endswith(".part") or n == shards.LOCK for n in listed)


def test_an_unfinished_directory_of_a_changed_folder_is_begun_anew(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "RECORDS_PER_SHARD", 5)
    root, data = epath.Path(photos), str(tmp_path / "data")
    write = shards.write

    def stop(path, *rest):
        if "00003" in path.name[:-9]:
            raise KeyboardInterrupt
        write(path, *rest)

    monkeypatch.setattr(shards, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        folder.prepare(root, "beasts", data)
    monkeypatch.setattr(shards, "write", write)
    put(photos / "train/ape/0000.png", encoded(77))
    folder.prepare(root, "beasts", data)
    opened = source(data)
    assert opened[0]["image"] == encoded(77) and len(opened) == 37


def test_a_restart_does_not_check_again(photos, tmp_path, monkeypatch):
    root, data = epath.Path(photos), str(tmp_path / "data")
    monkeypatch.setattr(shards, "write_all", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        folder.prepare(root, "beasts", data)
    monkeypatch.undo()
    monkeypatch.setattr(folder, "faults", lambda *_: 1 / 0)
    folder.prepare(root, "beasts", data)
    assert len(source(data)) == 36


def test_two_commands_do_not_write_to_one_place(tmp_path):
    final, made_of = epath.Path(tmp_path) / "x" / "1.0.0", {"source": "s", "fingerprint": "f"}
    with shards.writing(final, made_of):
        second = shards.writing(final, made_of)
        with pytest.raises(SetupError, match="Another process is writing to"):
            second.__enter__()
        assert not final.exists()
    assert final.exists()


def test_a_dry_run_writes_nothing(photos, toy, tmp_path):
    before, where = contents(tmp_path), str(tmp_path / "data")
    said = folder.prepare(epath.Path(photos), "beasts", where, dry_run=True)
    assert f"Would write {where}/beasts/1.0.0" in said and "(enough)" in said
    assert "36 records" in said and "9 records" in said and "1 shards" in said
    said = tfrecords.prepare(toy, where, dry_run=True)
    assert "23 records" in said and "4 shards" in said
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"Give one of --name, --from_tfrecord, --image_folder; found none"),
        ({"name": "x", "image_folder": "y"}, r"found --name, --image_folder"),
        ({"name": "x", "val_fraction": 0.1}, r"--val_fraction belongs to --image_folder, and"),
        ({"image_folder": "x", "as": "y", "verify": True}, r"--verify belongs to --name"),
        ({"from_tfrecord": "x", "skip_broken": True}, r"--skip_broken belongs to --image_folder"),
        ({"image_folder": "x"}, r"needs --as <name>"),
    ],
)
def test_flags_of_two_forms_are_refused(given, message):
    flags = dict.fromkeys([*command.FORMS, *sum(command.FORMS.values(), ())], "")
    with pytest.raises(SetupError, match=message):
        command._check(flags | given)


def test_the_command_prints_the_overrides_and_fails_with_a_paragraph(photos, tmp_path):
    def run(*more):
        arguments = ["--as=beasts", f"--data_dir={tmp_path / 'data'}", *more]
        return subprocess.run(
            [
                sys.executable,
                "-m",
                "supmim_jax.data.prepare",
                f"--image_folder={photos}",
                *arguments,
            ],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )

    out = run("--val_fraction=0.5")
    assert out.returncode == 2 and "Traceback" not in out.stderr
    assert "val is there, and --val_fraction is 0.5" in out.stderr
    out = run()
    assert out.returncode == 0 and "--config.data.train_examples=36" in out.stdout
    lines = out.stderr.splitlines()
    assert "checking: 100%" in out.stderr and "writing: 100%" in out.stderr
    assert all("\r" not in line and line.strip() for line in lines) and len(lines) <= 6


def test_what_is_not_writable_is_named(photos, tmp_path):
    put(tmp_path / "file")
    with pytest.raises(OSError, match="file"):  # which the command answers by a paragraph
        folder.prepare(epath.Path(photos), "beasts", str(tmp_path / "file"))


def test_a_bar_in_a_log_is_lines(capsys):
    with shards.progress_bar("counting", 3, "sheep") as bar:
        assert list(shards.counted("abc", bar)) == ["a", "b", "c"]
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("counting: 100%") and "3/3" in last and "sheep" in last


def test_importing_it_brings_in_no_tensorflow():
    code = "import sys, supmim_jax.data.prepare.__main__ as m; print('tensorflow' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "False"
