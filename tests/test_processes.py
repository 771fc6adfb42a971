"""Several real processes as one run, on loopback: their numbers, and how they fail together."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import FAST, ONE, REPOSITORY, final_state, metric_lines, train_command

from supmim_jax import checkpoint, multihost
from supmim_jax.config import changed
from supmim_jax.config.configdict import from_configdict, to_configdict
from supmim_jax.data import fractals
from supmim_jax.errors import SetupError
from supmim_jax.train import train

ENV = os.environ | {"XLA_FLAGS": FAST, "JAX_NUM_CPU_DEVICES": "1"}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@dataclasses.dataclass
class Ended:
    code: int
    out: str
    err: str
    seconds: float


def started(commands: list[list[str]], directories=(), env=ENV) -> list[subprocess.Popen]:
    """Each in a process group of its own."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options |= {"start_new_session": True, "env": env}
    places = directories or [REPOSITORY] * len(commands)
    return [
        subprocess.Popen([sys.executable, *command], cwd=place, **options)
        for command, place in zip(commands, places, strict=True)
    ]


def ended(processes: list[subprocess.Popen], within: float = 150) -> list[Ended]:
    """How each ended; none is left running."""
    start, found = time.monotonic(), []
    try:
        for process in processes:
            out, err = process.communicate(timeout=within - (time.monotonic() - start))
            found.append(Ended(process.returncode, out, err, time.monotonic() - start))
    finally:
        for process in processes:
            process.kill()
    return found


def trained(cfg, workdir: Path, processes: int, stop_at: int | None = None) -> list[Ended]:
    """A part of a run on so many processes of one device each."""
    asked = {
        "config": to_configdict(cfg).to_dict(),
        "workdir": str(workdir),
        "stop_at": stop_at,
        "coordinator": f"127.0.0.1:{free_port()}",
        "processes": processes,
    }
    commands = [["tests/process.py", json.dumps(asked | {"process": i})] for i in range(processes)]
    env = ENV | {"PYTHONPATH": REPOSITORY}
    found = ended(started(commands, env=env))
    assert [x.code for x in found] == [0] * processes, found
    return found


def faulty(workdir, data_dir, fault: dict, *more: str, log="log") -> subprocess.Popen:
    """A small run with a fault in it; see faulty.py."""
    _, _, *flags = train_command(workdir, data_dir, *more)
    fault = json.dumps(fault | {"log": str(workdir.parent / log)})
    env = ENV | {"FAULT": fault, "PYTHONPATH": REPOSITORY}
    return started([["tests/faulty.py", *flags]], env=env)[0]


def places(count: int) -> list[list[str]]:
    """The flags of each process."""
    address = f"127.0.0.1:{free_port()}"
    return [
        [f"--coordinator={address}", f"--num_processes={count}", f"--process_id={i}"]
        for i in range(count)
    ]


def assert_same_run(workdir, other) -> None:
    """Rankings jump where two similarities are next to equal; the first neighbours must not."""
    a, b = metric_lines(workdir), metric_lines(other)
    assert [x.keys() for x in a] == [x.keys() for x in b]
    for x, y in zip(a, b):
        for key in x:
            close = 1e-3 if key.startswith(("eval/map", "eval/recall", "eval/linear")) else 1e-5
            assert x[key] == pytest.approx(y[key], rel=close, abs=close), (x["step"], key)


def assert_same_end(cfg, workdir, other) -> None:
    """Adam magnifies rounding where a gradient is next to nothing; all in all it must not show."""
    states = [jax.tree.leaves(final_state(cfg, x)[0]["params"]) for x in (workdir, other)]
    a, b = (np.concatenate([np.ravel(x) for x in state]) for state in states)
    assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(a)
    a, b = (json.loads((x / "results.json").read_text()) for x in (workdir, other))
    assert a.keys() == b.keys() and (a["knn"], a["top1"]) == (b["knn"], b["top1"])


@pytest.fixture
def short(cfg):
    """With a fitted codebook; evaluated once on the way."""
    often = {"eval": {"every": 3}, "log": {"every": 1}, "checkpoint": {"every": 100}}
    return changed(cfg, data={"eval_split": "validation[:240]"}, epochs=1.5, **often)


@pytest.mark.parametrize(
    "parts_of", [((2, 3),), pytest.param(((2, 3), (4, 5)), marks=pytest.mark.slow)], ids=str
)
def test_other_numbers_of_processes_go_on_as_one_would(short, data_dir, tmp_path, parts_of):
    fractals.prepare("tiny", data_dir)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(short, whole, devices=ONE)
    told = [trained(short, parts, count, stop_at=step) for count, step in parts_of]
    train(short, parts, devices=ONE)
    assert_same_run(whole, parts)
    assert "eval/knn" in "".join(map(str, metric_lines(parts)[:4]))  # which two processes found
    assert_same_end(short, whole, parts)
    assert "supmim 1/6" in told[0][0].err and "supmim" not in told[0][1].err
    hosts = json.loads((parts / "environment.json").read_text())
    starts = [0, *(step for _, step in parts_of)]
    counts = [*(count for count, _ in parts_of), 1]
    assert [(x["from_step"], x["hosts"]) for x in hosts] == list(zip(starts, counts, strict=True))
    assert [x["devices"] for x in hosts] == [f"{n} x cpu" for n in counts]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "fsdp"), [(2, 1), (4, 2), (4, 4)])
def test_whole_runs_of_several_processes_equal_one(short, data_dir, tmp_path, processes, fsdp):
    """All evaluations that gather features; parameters split over processes."""
    fractals.prepare("tiny", data_dir)
    which = ("top1", "knn", "retrieval", "linear")
    cfg = changed(short, epochs=3, eval={"which": which, "linear": {"strengths": (1.0,)}})
    whole, several = tmp_path / "whole", tmp_path / "several"
    train(cfg, whole, devices=ONE)
    trained(changed(cfg, mesh={"fsdp": fsdp}), several, processes)
    assert_same_run(whole, several)
    assert_same_end(cfg, whole, several)


def test_another_config_or_code_is_named_on_every_process(data_dir, tmp_path):
    """data_dir and threads may differ; the seed, a line of code and a flag of JAX may not."""
    root = tmp_path / "copy"
    for part in ("supmim_jax", "configs"):
        shutil.copytree(Path(REPOSITORY, part), root / part)
    with (root / "supmim_jax" / "optim.py").open("a") as file:
        file.write("# edited\n")
    run = train_command(tmp_path / "run", data_dir)
    first, second, third = places(3)
    mine = ["--config.seed=7", "--config.data.threads=3", f"--config.data.data_dir={tmp_path}"]
    commands = [[*run, *first], [*run, *second, *mine], [*run, *third]]
    processes = started(commands[:2], [REPOSITORY] * 2)
    processes += started(commands[2:], [root], env=ENV | {"JAX_RANDOM_SEED_OFFSET": "5"})
    found = ended(processes)
    host = socket.gethostname()
    for process in found:
        assert process.code == 2 and process.seconds < 60
        assert f"process 1 on {host}: config.seed: 0; 7\n" in process.err
        assert f"process 2 on {host}: versions.jax_random_seed_offset: '0'; '5'; " in process.err
        assert "code.optim.py: '" in process.err
        assert "data_dir:" not in process.err and "threads" not in process.err
        assert "Traceback" not in process.err and process.err.count("error: ") == 1
    assert not (tmp_path / "run").exists()


def test_a_missing_process_is_told_within_the_time_to_join(data_dir, tmp_path):
    run = train_command(tmp_path / "run", data_dir, "--join_timeout=15")
    first, _, third = places(3)
    _, alone, _ = places(3)
    a, c, b = ended(started([[*run, *first], [*run, *third], [*run, *alone]]), within=60)
    for process in (a, b, c):
        assert process.code == multihost.EXIT_TRY_AGAIN and process.err.count("error: ") == 1
        assert "Traceback" not in process.err and "Start the same command" in process.err
    assert "Process 0 on" in a.err and "others did not come" in a.err
    assert "Process 2 on" in c.err and "answered" in c.err and "others did not come" in c.err
    assert "Process 1 on" in b.err and "process 0 did not come" in b.err
    assert not (tmp_path / "run").exists()


def wait_for(true: Callable[[], bool], seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.3)


@pytest.mark.parametrize("killed", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_when_a_process_dies_the_others_say_so_and_the_run_goes_on(data_dir, tmp_path, killed):
    """It ends like one process that nobody killed."""
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    flags = ("--config.epochs=3", "--config.checkpoint.every=4", "--config.eval.batch_size=400")
    run, processes = train_command(parts, data_dir, *flags), []
    for i, place in enumerate(places(2)):
        fault = {"signal": 9, "until": 10 if i == killed else 0}
        processes.append(faulty(parts, data_dir, fault, *flags, *place, log=f"log{i}"))
    processes[killed].wait(timeout=90)
    other = ended(processes, within=60)[1 - killed]
    assert other.code not in (0, 2, 3)
    expected = "process 1 on .* died" if killed else "leader task was preempted/died"
    assert re.search(expected, other.err), other.err
    assert checkpoint.steps(parts)[0] == 4  # for which the save after 8 waits
    assert [x.code for x in ended(started([[*run, *place] for place in places(2)]))] == [0, 0]
    cfg = from_configdict(json.loads((parts / "config.json").read_text()))
    train(cfg, whole, devices=ONE)
    assert_same_run(whole, parts)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_saves_and_ends_all_and_the_run_goes_on(number, data_dir, tmp_path):
    run = train_command(tmp_path, data_dir, "--config.epochs=9999")
    processes = started([[*run, *flags] for flags in places(2)])
    metrics = tmp_path / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and '"step": 3' in metrics.read_text())
    processes[1].send_signal(number)
    codes = []
    for process in ended(processes, within=60):
        codes.append(process.code)
        assert "Stopped by SIG" in process.err and "Traceback" not in process.err
    assert codes == [143, 128 + number]
    saved = checkpoint.steps(tmp_path)
    assert len(saved) == 1 and saved[0] == metric_lines(tmp_path)[-1]["step"]


def test_an_error_of_one_process_is_told_by_all(data_dir, tmp_path):
    """The second host lacks the data, and the first would wait for it."""
    run = train_command(tmp_path / "run", data_dir)
    first, second = places(2)
    found = ended(started([[*run, *first], [*run, *second, "--config.data.data_dir=/proc/here"]]))
    for process in found:
        assert process.code == 2 and "Set config.data.data_dir" in process.err
    assert f"process 1 on {socket.gethostname()}" in found[0].err


GKE = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "3"}


@pytest.mark.parametrize(
    ("flags", "env", "expected"),
    [
        (("", 0, -1), {}, multihost.Place()),
        (("a:1", 4, 0), {}, multihost.Place("a:1", 4, 0)),
        (("", 0, -1), {"JOB_COMPLETION_INDEX": "3"}, multihost.Place()),  # a TPU pod on GKE
        (("", 0, -1), GKE, multihost.Place("a:1", 4, 3)),
        (("b:2", 2, 1), {"JAX_PROCESS_ID": "0"}, multihost.Place("b:2", 2, 1)),
    ],
)
def test_flags_come_before_the_environment(flags, env, expected):
    assert multihost.place(*flags, env) == expected


@pytest.mark.parametrize("flags", [("a:1", 4, -1), ("a:1", 4, 4), ("a", 4, 0), ("", 4, 0)])
def test_half_a_place_is_refused(flags):
    with pytest.raises(SetupError, match="Give each process --coordinator"):
        multihost.place(*flags, {})
