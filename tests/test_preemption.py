"""Runs that are killed, told to stop or hang, as processes; the long storms are tests/storm.py."""

import json
import signal
import socket
import subprocess
import sys
import time

import pytest
import storm
from conftest import FAST, REPOSITORY
from etils import epath
from test_processes import ended, faulty, places

from supmim_jax import checkpoint, multihost
from supmim_jax.data import fractals


@pytest.fixture(scope="module")
def left_alone(data_dir, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XLA_FLAGS", FAST)  # and one device
        yield storm.undisturbed(2, tmp_path_factory.mktemp("storm"), data_dir)


@pytest.fixture
def place(request, tmp_path) -> epath.Path:
    """Where a run is, and that nothing else uses."""
    if request.param == "local":
        return epath.Path(tmp_path)
    return epath.Path(request.getfixturevalue("bucket")) / tmp_path.name


def in_each_place(*long: str) -> pytest.MarkDecorator:
    """Runs the test on the local disk and in a bucket; the places in `long` need --slow."""
    places = [
        pytest.param(x, marks=[pytest.mark.slow] * (x in long), id=x) for x in ("local", "bucket")
    ]
    return pytest.mark.parametrize("place", places, indirect=True)


@in_each_place("bucket")
def test_a_run_that_is_killed_again_and_again_ends_as_if_left_alone(left_alone, place, tmp_path):
    """In the middle of a line and of a save."""
    points = [("half a line", 2), ("before commit", 2)]
    run = left_alone.another(place / "run", tmp_path / "run.log")
    found = storm.storm(signal.SIGKILL, 2, 0, run, left_alone, points)
    assert [x["point"] for x in found] == ["half a line", "before commit"]
    assert found[1]["done"] > found[1]["saved"]


@in_each_place("local")
def test_a_run_that_is_told_to_stop_loses_no_step(left_alone, place, tmp_path):
    """In the middle of a save and of an evaluation."""
    points = [("before commit", 2), ("evaluation", 3)]
    run = left_alone.another(place / "run", tmp_path / "run.log")
    found = storm.storm(signal.SIGTERM, 2, 0, run, left_alone, points)
    assert [x["point"] for x in found] == ["before commit", "evaluation"]
    assert found[1]["saved"] >= found[0]["saved"] > 0


def test_sigterm_in_an_evaluation_ends_all_processes_at_once(data_dir, tmp_path):
    """The evaluation of 8 batches would take 12 s."""
    fractals.prepare("tiny", data_dir)
    slowly = "--config.epochs=9", "--config.eval.every=3", "--config.eval.batch_size=64"
    processes = []
    for i, flags in enumerate(places(2)):
        fault = {"slow": 1.5} | ({"signal": 15, "at": "evaluation", "count": 1} if i else {})
        processes.append(faulty(tmp_path / "run", data_dir, fault, *slowly, *flags))
    for process in ended(processes, within=90):
        assert process.code == 143 and multihost.stopped()[0] in process.err
    assert checkpoint.steps(tmp_path / "run") == [3]


def test_a_run_that_hangs_says_where_and_ends(data_dir, tmp_path):
    fault = {"signal": "hang", "at": "batch", "count": 12}
    quick = "--config.epochs=99", "--config.watch.stall_seconds=2", "--config.watch.stall_factor=10"
    (process,) = ended([faulty(tmp_path / "run", data_dir, fault, *quick)], within=90)
    assert process.code == 1 and "after step 11" in process.err
    assert 'faulty.py", line' in process.err and "in following" in process.err


def test_sigterm_while_python_compiles_or_computes_ends_at_once(tmp_path):
    """A signal's handler would run only when C code returns to Python; here it never does."""
    code = "import hashlib, threading\n"
    code += "threading.Timer(0.2, os.kill, (os.getpid(), 15)).start()\n"
    code += "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
    _, err = (process := listening(code)).communicate(timeout=40)
    assert process.returncode == 143 and multihost.stopped()[0] in err


def test_who_is_behind_is_named(monkeypatch):
    class Store:
        def key_value_dir_get(self, key):
            return [(f"{key}/0", "9 41"), (f"{key}/1", "8 40"), (f"{key}/2", "9 41")]

    monkeypatch.setattr(multihost, "active", lambda: True)
    monkeypatch.setattr(multihost, "_store", Store)
    monkeypatch.setitem(multihost.hosts, 1, socket.gethostname())
    assert multihost.behind() == f"process 1 on {socket.gethostname()} at step 40"


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(x, marks=pytest.mark.slow) for x in (signal.SIGINT, signal.SIGHUP)),
    ],
)
def test_a_signal_to_all_of_a_runs_processes_loses_no_step_either(number, data_dir, tmp_path):
    """As `timeout` or a terminal sends it: also to the one that decodes, on whom the run waits."""
    fault = {"signal": number, "at": "batch", "count": 30, "group": True}
    small = ("width=8", "heads=1", "mlp_dim=8")  # so that all time is the decoder's
    flags = [f"--config.model.{x}" for x in small] + ["--config.batch_size=240"]
    flags += ["--config.epochs=99", "--config.data.workers=1", "--config.data.crop=inception"]
    (process,) = ended([faulty(tmp_path / "run", data_dir, fault, *flags)], within=90)
    assert process.code == 128 + number and "Traceback" not in process.err, process.err
    assert f"Stopped by {number.name}" in process.err
    done = [json.loads(x).get("done", 0) for x in (tmp_path / "log").read_text().splitlines()]
    assert checkpoint.steps(tmp_path / "run") == [max(done)] and 29 <= max(done) < 35


def listening(code: str, ignored: tuple = ()) -> subprocess.Popen:
    """A process with `code` after it has begun to listen; a parent may have it ignore signals."""
    start = "import os, signal, sys, time\nfrom supmim_jax import multihost\n"
    before = [signal.signal(number, signal.SIG_IGN) for number in ignored]
    try:
        return subprocess.Popen(
            [sys.executable, "-c", f"{start}multihost.listen()\n{code}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
    finally:
        for number, handler in zip(ignored, before):
            signal.signal(number, handler)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_ctrl_c_ends_at_once(first):
    """Not the one that a wrapper passes on in the same moment."""
    code = f"multihost.hold()\nos.kill(os.getpid(), {first:d})\nos.kill(os.getpid(), 2)\n"
    code += "time.sleep(1)\nprint('waits', flush=True)\nos.kill(os.getpid(), 2)\ntime.sleep(99)"
    out, err = (process := listening(code)).communicate(timeout=60)
    assert process.returncode == 130 and out == "waits\n" and "Traceback" not in err


def test_signals_that_nohup_or_a_shell_has_it_ignore_stay_ignored():
    code = "os.kill(os.getpid(), 1)\nos.kill(os.getpid(), 2)\ntime.sleep(1)\nprint('goes on')"
    out, _ = (process := listening(code, (signal.SIGINT, signal.SIGHUP))).communicate(timeout=60)
    assert process.returncode == 0 and out == "goes on\n"


def test_a_process_that_stood_still_goes_on_and_a_stall_after_it_is_found():
    code = (
        "from supmim_jax.config import WatchConfig\n"
        "from supmim_jax.watchdog import Watchdog\n"
        "with Watchdog(WatchConfig(stall_seconds=1.5, stall_factor=2.0)) as watch:\n"
        "    for step in range(30):\n"
        "        watch.beat(step)\n"
        "        time.sleep(0.1)\n"
        "        print(step, flush=True)\n"
        "    time.sleep(99)\n"
    )
    process = listening(code)
    for _ in range(10):
        process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert out.endswith("29\n") and process.returncode == 1 and "after step 29" in err


@pytest.mark.slow
def test_several_processes_go_back_together(data_dir, tmp_path):
    going_back = ("--config.epochs=3", "--config.checkpoint.every=4", "--config.watch.roll_backs=1")
    processes = []
    for i, flags in enumerate(places(2)):
        fault = {"nan": 7, "slow": 0.3 * i}
        processes.append(faulty(tmp_path / "run", data_dir, fault, *going_back, *flags))
    assert [x.code for x in ended(processes, within=120)] == [0, 0]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["skipped_batches"] == 3
