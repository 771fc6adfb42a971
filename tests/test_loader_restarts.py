"""A run's sequence of ids, over kills at random steps and changes of the number of hosts."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from loader_host import BATCH, config

from supmim_jax.data import fractals
from supmim_jax.data.loader import Dataset

SAVED_EVERY = 10  # steps, as a run saves its position; what comes after is read again


class Part:
    """Hosts that read together from `first_step` on, until they end or are killed."""

    def __init__(self, hosts: int, first_step: int, asked: dict, directory: Path):
        self.hosts, self.first_step = hosts, first_step
        self.outs = [directory / f"{first_step}-{host}" for host in range(hosts)]
        asked = asked | {"hosts": hosts, "first_step": first_step}
        command = (sys.executable, f"{REPOSITORY}/tests/loader_host.py")
        env = {"PYTHONPATH": REPOSITORY, "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"}
        self.processes = [
            subprocess.Popen(
                [*command, json.dumps(asked | {"host": host, "out": str(out)})], env=env
            )
            for host, out in enumerate(self.outs)
        ]

    def lines(self, host: int) -> list[list[int]]:
        """[step, ids...] of each batch that the host has finished; a torn last line is not one."""
        out = self.outs[host]
        return [json.loads(x) for x in out.read_text().split("\n")[:-1]] if out.exists() else []

    def kill_at(self, step: int) -> None:
        """SIGKILL to all hosts when one has come to the step; no effect once they have ended."""
        while all(p.poll() is None for p in self.processes):
            if max(len(self.lines(h)) for h in range(self.hosts)) + self.first_step >= step:
                break
            time.sleep(0.02)
        for process in self.processes:
            process.kill()
            process.wait()

    def finish(self) -> None:
        assert [p.wait() for p in self.processes] == [0] * self.hosts

    def steps(self) -> dict[int, list[int]]:
        """Ids of each global batch that all hosts have read, by step."""
        hosts = [{line[0]: line[1:] for line in self.lines(h)} for h in range(self.hosts)]
        common = set.intersection(*(set(host) for host in hosts))
        return {step: [i for host in hosts for i in host[step]] for step in sorted(common)}


def storm(data_dir: str, directory: Path, kills: int, epochs: int, seed: int) -> list[list[int]]:
    """Ids of every step of a run that is killed so often; its host and worker counts change."""
    rng, kept, position = random.Random(seed), {}, 0
    total = config(data_dir, 0, epochs).total_steps
    for number in range(kills + 1):
        asked = {"data_dir": data_dir, "workers": rng.choice((0, 0, 2)), "epochs": epochs}
        part = Part(rng.choice((1, 2, 4)), position, asked, directory)
        if number == kills:
            part.finish()
        else:
            share = (total - position) // (kills - number + 1)
            part.kill_at(position + rng.randint(1, 2 * max(share, 1)))
        steps = part.steps()
        end = max(steps, default=position - 1) + 1
        saved = end if end == total else end - end % SAVED_EVERY
        kept |= {step: ids for step, ids in steps.items() if step < saved}
        position = max(position, saved)
    assert list(kept) == list(range(total))
    return list(kept.values())


@pytest.mark.parametrize(
    ("kills", "epochs"), [(3, 16), pytest.param(20, 200, marks=pytest.mark.slow)]
)
def test_killed_runs_of_changing_hosts_read_what_an_uninterrupted_one_reads(
    data_dir, tmp_path, kills, epochs
):
    fractals.prepare("tiny", data_dir)
    found = storm(data_dir, tmp_path, kills, epochs, seed=kills)
    cfg = config(data_dir, 0, epochs)
    whole = [arrays["id"].tolist() for arrays in Dataset.open(cfg).train_on_host(range(BATCH))]
    assert found == whole
    ids = np.array(found).reshape(epochs, cfg.data.train_examples)
    assert (np.sort(ids, axis=1) == np.arange(cfg.data.train_examples)).all()
    assert len(np.unique(ids, axis=0)) == epochs


def test_every_split_into_hosts_reads_the_same_images(data_dir):
    """Pixels too: what one host reads, two and four read in their rows."""
    dataset = Dataset.open(config(data_dir, 0, 1))
    whole = list(dataset.train_on_host(range(BATCH)))
    for hosts in (2, 4):
        parts = [dataset.train_on_host(rows, 3) for rows in np.split(np.arange(BATCH), hosts)]
        for step, arrays in enumerate(zip(*parts, strict=True), 3):
            for name, expected in whole[step].items():
                joined = np.concatenate([part[name] for part in arrays])
                assert np.array_equal(joined, expected), (hosts, step, name)


def test_workers_do_not_outlive_a_killed_host(data_dir, tmp_path):
    asked = {"data_dir": data_dir, "workers": 2, "epochs": 4000}
    part = Part(1, 0, asked, tmp_path)
    while not part.lines(0):
        assert part.processes[0].poll() is None
        time.sleep(0.1)
    (pid,) = (p.pid for p in part.processes)
    workers = subprocess.check_output(["pgrep", "-P", str(pid), "-f", "spawn_main"]).split()
    assert len(workers) == 2
    part.kill_at(1)
    deadline = time.monotonic() + 20
    while any(Path("/proc", worker.decode()).exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker is still there"
        time.sleep(0.1)
