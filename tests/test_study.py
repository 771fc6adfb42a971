"""Studies: cells of runs and seeds, in processes of their own, and what is made of them."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from conftest import ONE, python
from etils import epath
from scipy import stats

from supmim_jax import sharding, storage, study
from supmim_jax.config import EvalConfig, FewShotConfig, ProbeConfig, changed
from supmim_jax.data.loader import Dataset
from supmim_jax.errors import SetupError
from supmim_jax.study import Cell, Study, compared
from supmim_jax.train_step import TrainStep

FILE = """
import dataclasses
from configs import debug, debug_supervised
from supmim_jax import config as c
from supmim_jax.study import Study

def study():
    small = dict(epochs=0.5, model=dict(depth=1, width=8, heads=1))
    small["data"] = dict(data_dir={data_dir!r})
    runs = {{"without": debug_supervised.experiment(), "with": debug.experiment()}}
    runs = {{name: c.changed(run, **small) for name, run in runs.items()}}
    probe = c.ProbeConfig(eval=c.EvalConfig(which=("top1",)))
    return Study("Which?", runs, "without", (0, 1), probe, {{"top1": "top-1"}})
"""


@pytest.fixture
def small(cfg, supervised) -> Study:
    runs = {"without": supervised, "with": cfg}
    probe = ProbeConfig(eval=EvalConfig(which=("top1",)))
    return Study("Which?", runs, "without", (0, 1, 2), probe, {"top1": "top-1"})


def rows_of(values: dict[str, list[float]]) -> list[dict]:
    return [
        {"run": run, "seed": seed, "metrics": {"top1": value}}
        for run, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]


def test_differences_are_paired_and_their_interval_is_students():
    rows = rows_of({"without": [10.0, 20.0, 30.0], "with": [12.0, 23.0, 31.0]})
    found = compared(rows, "without", "with", "top1")
    expected = stats.ttest_rel([12.0, 23.0, 31.0], [10.0, 20.0, 30.0]).confidence_interval(0.95)
    assert found.mean == 22.0 and found.differences.tolist() == [2.0, 3.0, 1.0]
    assert found.differences.mean() - found.margin == pytest.approx(expected.low)
    assert found.differences.mean() + found.margin == pytest.approx(expected.high)
    one = compared(rows[:1] + rows[3:4], "without", "with", "top1")
    assert one.differences.tolist() == [2.0] and math.isnan(one.margin)
    assert not len(compared(rows[:1] + rows[4:5], "without", "with", "top1").differences)
    assert compared(rows, "without", "with", "knn") is None


def test_what_the_probe_cannot_do_is_told_before_a_cell_trains(small, tmp_path):
    few = EvalConfig(which=("few_shot",), few_shot=FewShotConfig(shots=9))
    wrong = dataclasses.replace(small, probe=ProbeConfig(eval=few), metrics={"few_shot": "9-shot"})
    directory = epath.Path(tmp_path) / "cell"
    with pytest.raises(SetupError, match=r"few_shot\.shots is 9.*'train\[:64\]'"):
        study.train_cell(wrong, Cell("without", 0), directory)
    assert not directory.exists()


def test_what_is_there_is_written_while_the_rest_is_missing(small, tmp_path):
    out = epath.Path(tmp_path)
    for row in rows_of({"without": [50.0, 40.0], "with": [55.0]}):
        row["config_sha256"] = study.digest(small.config(Cell(row["run"], row["seed"])))
        (out / f"{row['run']}-{row['seed']}").mkdir()
        storage.write_json(out / f"{row['run']}-{row['seed']}" / "study.json", row)
    assert len(study.write(small, out)) == 3
    lines = (out / "table.md").read_text().splitlines()
    assert lines[0] == "Which?"
    cells = [[x.strip() for x in line.split("|")[1:-1]] for line in lines[4:]]
    assert [(x[0], x[1], x[3]) for x in cells] == [
        ("without", "2", "45.00"),
        ("with", "1", "55.00 (+5.00)"),
    ]
    assert cells[0][2] == "1.00" and float(cells[1][2]) > 1.5
    assert (out / "figure.svg").read_text().count("<svg") == 1
    assert [json.loads(x)["run"] for x in (out / "results.jsonl").read_text().splitlines()] == [
        "without",
        "without",
        "with",
    ]


def test_runs_of_a_seed_begin_alike_and_see_the_same_images(small, one_device):
    params, ids, views = [], [], []
    for run in small.runs.values():
        cfg = dataclasses.replace(run, seed=3)
        built = TrainStep.build(cfg, one_device)
        params.append(built.init(jax.random.key(cfg.seed)).params["encoder"])
        batch = next(Dataset.open(cfg).train(sharding.make_mesh(cfg.mesh, ONE)))
        ids.append(np.asarray(batch.id))
        views.append(np.asarray(batch.views[0]))
    jax.tree.map(np.testing.assert_array_equal, *params)
    np.testing.assert_array_equal(*ids)
    np.testing.assert_array_equal(*views)


def test_a_study_that_is_told_to_stop_starts_no_other_cell(small, tmp_path):
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
    pool = study.Pool(sleeps, epath.Path(tmp_path), ["", ""])
    run = threading.Thread(target=study.run_cells, args=(small, study.asked(small, ""), pool))
    run.daemon = True  # it waits for good: the process of a study ends here
    run.start()
    while len(pool.running) < 2:
        time.sleep(0.01)
    pool.stop()
    time.sleep(1)
    assert len(list(tmp_path.glob("*.log"))) == 2


def test_what_was_trained_with_another_config_is_not_taken_for_a_cell(small, tmp_path):
    (tmp_path / "with-1").mkdir()
    row = {"run": "with", "seed": 1, "metrics": {}, "config_sha256": "0"}
    storage.write_json(epath.Path(tmp_path) / "with-1" / "study.json", row)
    with pytest.raises(SetupError, match="has with-1 of another config"):
        study.measured(small, epath.Path(tmp_path))


def test_a_cell_counts_wherever_data_and_tokenizer_are_but_not_with_another_tokenizer(small):
    def digest(data_dir: str, path: str) -> str:
        places = {"data": {"data_dir": data_dir}, "objective": {"target": {"path": path}}}
        return study.digest(changed(small.runs["with"], **places))

    here = digest("/a/data", "/a/runs/codes")
    assert digest("", "/b/codes") == here
    assert digest("", "/b/others") != here and digest("", "") != here


def test_results_of_another_machine_stay_and_a_damaged_line_is_named(small, tmp_path):
    out = epath.Path(tmp_path)
    (row,) = rows_of({"with": [55.0]})
    row["config_sha256"] = study.digest(small.config(Cell("with", 0)))
    lines = [json.dumps(x) + "\n" for x in (row, {"run": "former", "seed": 9})]
    (tmp_path / "results.jsonl").write_text("".join(lines))
    assert study.write(small, out) == [row]
    assert (tmp_path / "results.jsonl").read_text() == "".join(lines)
    (tmp_path / "results.jsonl").write_text(lines[0] + "{")
    with pytest.raises(SetupError, match=r"results\.jsonl, line 2"):
        study.measured(small, out)


def test_a_metric_that_the_probe_does_not_give_is_named_at_once(small):
    with pytest.raises(SetupError, match=r"knn.*top1"):
        dataclasses.replace(small, metrics={"knn": "kNN"})


@pytest.mark.parametrize("name", ["a, b", "a/b", ""])
def test_a_name_that_no_directory_or_flag_can_hold_is_refused(small, name):
    with pytest.raises(SetupError, match=f"runs has '{name}'"):
        dataclasses.replace(small, runs=small.runs | {name: small.runs["with"]})


def test_a_name_that_is_another_runs_cell_is_refused(small):
    with pytest.raises(SetupError, match="runs has with-1, which is also"):
        dataclasses.replace(small, runs=small.runs | {"with-1": small.runs["with"]})


def test_cells_are_run_by_name_and_seed(small):
    assert len(study.asked(small, "")) == 6
    assert study.asked(small, "with") == [Cell("with", i) for i in range(3)]
    assert study.asked(small, "with-1,without-2") == [Cell("with", 1), Cell("without", 2)]


def test_a_study_ends_resumes_and_gives_the_numbers_of_a_run_alone(data_dir, tmp_path):
    (tmp_path / "mine.py").write_text(FILE.format(data_dir=data_dir))

    def command(*more: str) -> subprocess.CompletedProcess:
        flags = "--study=mine.py", "--out=out", *more
        return python("-m", "supmim_jax.study", *flags, cwd=tmp_path)

    done = command("--only=without-0,with-1", "--jobs=2")
    assert done.returncode == 0, done.stderr + done.stdout
    rows = [json.loads(x) for x in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [(x["run"], x["seed"], x["steps"]) for x in rows] == [("without", 0, 2), ("with", 1, 2)]
    assert all(x["probed"]["devices"] and len(x["config_sha256"]) == 64 for x in rows)
    assert all(x["trained"][-1]["devices"] == x["probed"]["devices"] for x in rows)
    shutil.rmtree(tmp_path / "out" / "without-0")  # results.jsonl has it still
    shutil.rmtree(tmp_path / "out" / "with-1")
    kept = (tmp_path / "out" / "results.jsonl").read_text().splitlines()[0]
    (tmp_path / "out" / "results.jsonl").write_text(kept + "\n")
    assert command("--only=without-0,with-1").returncode == 0
    assert not (tmp_path / "out" / "without-0").exists()
    again = [json.loads(x) for x in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [x["metrics"] for x in again] == [x["metrics"] for x in rows]
    (tmp_path / "out" / "with-0").write_text("in its way")
    failed = command("--only=with-0")
    assert failed.returncode == 2 and "2 of 4 cells are done" in failed.stdout
    assert re.search(r"with-0 with 2 \(.*with-0\.log\)\. error: .*with-0", failed.stderr)
    wrong = command("--only=nobody")
    assert wrong.returncode == 2 and "nobody" in wrong.stderr and "without, with" in wrong.stderr
    wrong = command("--only=with-1", "--baseline=nobody")
    assert wrong.returncode == 2 and "'nobody'; runs are without, with" in wrong.stderr
