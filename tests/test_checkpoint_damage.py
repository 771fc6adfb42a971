"""Damaged checkpoints are named, never restored, and set aside if asked."""

import dataclasses
import shutil
import subprocess
from pathlib import Path

import fuzz_checkpoint
import jax
import pytest
from conftest import ONE, final_state, restored, same
from etils import epath

from supmim_jax import checkpoint, multihost
from supmim_jax.checkpoint import Checkpoint, checksums, restore
from supmim_jax.errors import SetupError
from supmim_jax.train import train

pytestmark = pytest.mark.usefixtures("build_once")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run with checkpoints of steps 4 and 8."""
    return fuzz_checkpoint.save(tmp_path_factory.mktemp("run"))


@pytest.fixture
def saved(original, tmp_path):
    """A copy of it to be damaged, and its newest checkpoint."""
    shutil.copytree(original.workdir, tmp_path, dirs_exist_ok=True)
    return dataclasses.replace(original, workdir=tmp_path)


@pytest.fixture
def newest(saved) -> epath.Path:
    return checkpoint.locate(str(saved.workdir))


def largest(directory: epath.Path) -> epath.Path:
    return max(checksums.files(directory).values(), key=lambda path: path.stat().length)


def change(path: epath.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_the_sums_are_those_of_sha256sum(newest):
    if shutil.which("sha256sum") is None:
        pytest.skip("this system has no sha256sum")
    out = subprocess.run(
        ["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=newest, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stdout + out.stderr
    listed = [line.partition(": ")[0] for line in out.stdout.splitlines()]
    there = {str(p.relative_to(newest)) for p in Path(newest).rglob("*") if p.is_file()}
    assert listed == sorted(listed)
    assert there - set(listed) == {"SHA256SUMS", "_CHECKPOINT_METADATA", "commit_success.txt"}
    written = [
        Path(newest, name).stat().st_mtime_ns for name in ("SHA256SUMS", "commit_success.txt")
    ]
    assert written == sorted(written)  # before the commit


HARMLESS = [
    *(("_CHECKPOINT_METADATA", x) for x in (b"", b"{", b"[1]", b"\xff")),  # orbax's own notes
    ("_CHECKPOINT_METADATA", b'{"commit_timestamp_nsecs": 1e40}'),
    *((x, b"x") for x in (".DS_Store", "state/._manifest.ocdbt", "state/d/.nfs00000000000a1")),
    ("run/Thumbs.db", b"x"),
]


@pytest.mark.parametrize(("name", "content"), HARMLESS)
def test_what_orbax_and_systems_note_in_directories_does_not_matter(saved, newest, name, content):
    (newest / name).write_bytes(content)
    assert set(fuzz_checkpoint.outcomes(saved, saved.workdir).values()) == {"right"}


DAMAGE = {
    "sums missing": (
        lambda d: (d / "SHA256SUMS").unlink(),
        r"SHA256SUMS, which lists its files, is missing\. .* sha256sum",
    ),
    "sums cut off": (
        lambda d: (d / "SHA256SUMS").write_text((d / "SHA256SUMS").read_text()[:100]),
        r"SHA256SUMS cannot be read \(line 2 is no hash and name of a file\)",
    ),
    "sums empty": (
        lambda d: (d / "SHA256SUMS").write_text(""),
        r"SHA256SUMS cannot be read \(it is empty\)",
    ),
    "sums of bytes": (
        lambda d: (d / "SHA256SUMS").write_bytes(b"\xff\xfe"),
        r"SHA256SUMS cannot be read \('utf-8' codec",
    ),
    "file missing": (
        lambda d: (d / "state/manifest.ocdbt").unlink(),
        r"state/manifest\.ocdbt is missing\.",
    ),
    "directory missing": (lambda d: (d / "run").rmtree(), r"run/commit_success\.txt is missing; "),
    "byte changed": (
        lambda d: change(largest(d)),
        r"state/ocdbt\S+ has \d+ bytes of SHA-256 \w{16}\.\.\., and SHA256SUMS says \w{16}\.\.\.",
    ),
    "another config": (
        lambda d: (d / "config/metadata").write_text((d / "config/metadata").read_text() + " "),
        r"config/metadata has \d+ bytes of SHA-256",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_damage_is_named_by_all_that_reads(saved, newest, kind):
    damaging, message = DAMAGE[kind]
    damaging(newest)
    for read in fuzz_checkpoint.READERS.values():
        with pytest.raises(SetupError, match=rf"{newest} is damaged: {message}") as error:
            read(saved, saved.workdir)
        assert "Choose another step with @step" in str(error.value)
        assert "--use_older_checkpoint" in str(error.value)


def test_a_whole_checkpoint_with_more_files_is_refused_and_never_set_aside(saved, newest):
    (newest / "state/more").write_text("")
    for read in fuzz_checkpoint.READERS.values():
        with pytest.raises(SetupError, match="state/more") as error:
            read(saved, saved.workdir)
        assert "--use_older_checkpoint" not in str(error.value)
    with pytest.raises(SetupError, match="state/more"):
        checkpoint.Checkpoints(saved.workdir, saved.cfg.checkpoint).newest(use_older=True)
    assert newest.is_dir()
    (newest / "state/more").unlink()
    checkpoint.verify(newest)


def test_a_save_that_cannot_be_restored_does_not_count(saved, newest, monkeypatch):
    """orbax says nothing where it finds no array to list, as with a [ in the path."""
    checking = checksums.check_arrays

    def losing(directory):
        (directory / "state" / "manifest.ocdbt").unlink()
        checking(directory)

    monkeypatch.setattr(checksums, "check_arrays", losing)
    checkpoints = checkpoint.Checkpoints(saved.workdir, saved.cfg.checkpoint)
    state, _ = restored(checkpoints.workdir, 8, saved.like)
    with pytest.raises(SetupError, match=r"state .*60 arrays"):
        checkpoints.save(state.replace(step=jax.numpy.int32(12)), saved.cfg, saved.run)
        checkpoints.wait()
    assert checkpoint.steps(saved.workdir) == [4, 8]


def test_a_checkpoint_without_sums_is_trusted_by_the_command_that_the_error_gives(saved, newest):
    (newest / "SHA256SUMS").unlink()
    with pytest.raises(SetupError) as error:
        checkpoint.verify(newest)
    command = str(error.value).partition("as it is: ")[2]
    subprocess.run(command, shell=True, check=True)
    assert fuzz_checkpoint.by_training(saved, saved.workdir)


def test_directories_that_were_swapped_are_refused(saved, newest):
    newest.rename(newest.parent / "x")
    (newest.parent / "4").rename(newest)
    (newest.parent / "x").rename(newest.parent / "4")
    for step, position in ((4, 128), (8, 64)):
        with pytest.raises(SetupError, match=rf"saved after {position} examples .* step {step}:"):
            Checkpoint.read(newest.parent / str(step))
    with pytest.raises(SetupError, match="directories were renamed"):
        checkpoint.Checkpoints(saved.workdir, saved.cfg.checkpoint).newest()


def test_a_state_of_another_step_is_refused_whatever_the_rest_says(saved, newest, monkeypatch):
    shutil.rmtree(newest / "state")
    shutil.copytree(newest.parent / "4" / "state", newest / "state")
    monkeypatch.setattr(restore, "verify", lambda directory: None)
    with pytest.raises(SetupError, match=f"{newest} is damaged: it holds the state of step 4"):
        restored(saved.workdir, 8, saved.like)


def test_what_orbax_cannot_read_is_no_traceback(saved, newest, monkeypatch):
    monkeypatch.setattr(restore, "verify", lambda directory: None)
    for name in ("state/d", "state/manifest.ocdbt", "state/_METADATA", "state"):
        path = newest / name
        path.rmtree() if path.is_dir() else path.unlink()
        for read in (fuzz_checkpoint.by_params, lambda s, d: Checkpoint.read(newest).tree()):
            with pytest.raises(SetupError, match="is not a readable checkpoint: its `state`"):
                read(saved, saved.workdir)


def test_processes_share_the_files_and_all_hear_of_damage(newest, monkeypatch):
    read = []
    hashing = checksums.digest
    monkeypatch.setattr(checksums, "digest", lambda path: read.append(path) or hashing(path))
    monkeypatch.setattr(multihost, "active", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(multihost, "gather", lambda topic, here, patience: [here])
    for process in range(3):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        checkpoint.verify(newest)
    assert len(read) == len(set(read)) == len(checksums.read(newest))
    monkeypatch.setattr(multihost, "gather", lambda *a: ["", "8 is damaged", ""])
    with pytest.raises(SetupError, match="8 is damaged"):
        checkpoint.verify(newest)


def test_damaged_checkpoints_are_set_aside_if_asked(saved, newest, capsys):
    root = newest.parent
    for expected in ("8.damaged", "8.damaged-2"):
        shutil.copytree(root / "4", root / "12.orbax-checkpoint-tmp")
        change(largest(newest))
        kept = largest(newest).read_bytes()
        with pytest.raises(SetupError, match=f"{newest} is damaged"):
            checkpoint.Checkpoints(saved.workdir, saved.cfg.checkpoint).newest()
        checkpoints = checkpoint.Checkpoints(saved.workdir, saved.cfg.checkpoint)
        assert checkpoints.newest(use_older=True).step == 4 == checkpoints.latest()
        assert f"It is kept as {root / expected}; going on from step 4." in capsys.readouterr().err
        assert largest(root / expected).read_bytes() == kept
        assert checkpoint.steps(saved.workdir) == [4]
        state, _ = restored(checkpoints.workdir, 4, saved.like)
        checkpoints.save(state.replace(step=jax.numpy.int32(8)), saved.cfg, saved.run)
        checkpoints.close()
        assert not (root / "12.orbax-checkpoint-tmp").exists()  # left by a save that was killed
    (root / "8" / "run" / "metadata").unlink()
    (root / "4" / "run" / "metadata").unlink()
    checkpoints = checkpoint.Checkpoints(saved.workdir, saved.cfg.checkpoint)
    assert checkpoints.newest(use_older=True) is None and checkpoint.steps(saved.workdir) == []
    assert "going on from step 0, as there is no other checkpoint." in capsys.readouterr().err
    names = {path.name for path in root.iterdir()}
    assert names == {"4.damaged", "8.damaged", "8.damaged-2", "8.damaged-3"}


def test_a_run_goes_on_from_an_older_checkpoint_as_if_nothing_was(supervised, tmp_path):
    results = train(supervised, tmp_path, devices=ONE)
    assert set(results) >= {"top1", "knn"} == set(supervised.metrics)
    whole, _ = final_state(supervised, tmp_path)
    change(largest(tmp_path / "checkpoints" / "12"))
    (tmp_path / "results.json").unlink()
    with pytest.raises(SetupError, match=r"checkpoints/12 is damaged.*--use_older_checkpoint"):
        train(supervised, tmp_path, devices=ONE)
    again = train(supervised, tmp_path, devices=ONE, use_older_checkpoint=True)
    found, _ = final_state(supervised, tmp_path)
    assert same(found, whole) and again["knn"] == results["knn"]
    assert (tmp_path / "checkpoints" / "12.damaged").is_dir()


def test_random_damage_is_never_restored(original, tmp_path):
    assert set(fuzz_checkpoint.outcomes(original, original.workdir).values()) == {"right"}
    counts, failures = fuzz_checkpoint.fuzz(original, 40, 1, tmp_path)
    assert failures == [] and sum(counts.values()) == 40
