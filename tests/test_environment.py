"""What a run notes about where it was trained."""

import json
import subprocess

import jax
import orbax.checkpoint as ocp
import pytest
from conftest import ONE, python, same, train_command
from etils import epath

from supmim_jax import environment as environment_module
from supmim_jax import sharding, train
from supmim_jax.config import (
    CMAEConfig,
    PixelsConfig,
    SupMIMConfig,
    VQGANConfig,
    VQGANObjectiveConfig,
    changed,
)
from supmim_jax.errors import SetupError
from supmim_jax.train_step import TrainStep
from supmim_jax.workdir import Workdir


def test_it_names_versions_devices_and_processes():
    found = environment_module.collect(jax.devices())
    assert found["devices"] == "8 x cpu" and found["hosts"] == 1 and found["CPUs per host"] > 0
    assert found["CPU"]
    assert found["jax"] == jax.__version__ and found["python"].startswith("3.")
    assert json.loads(json.dumps(found)) == found


def test_the_commit_is_that_of_a_tracked_file_and_tells_of_changes(tmp_path, monkeypatch):
    file, stranger = tmp_path / "package" / "module.py", tmp_path / "package" / "other.py"
    file.parent.mkdir()
    file.write_text("1")
    assert environment_module.commit(file) == ""

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e")
        command = ("git", "-C", str(tmp_path), *identity, *arguments)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert environment_module.commit(file) == head
    file.write_text("2")
    assert environment_module.commit(file) == f"{head} with changes"
    assert environment_module.commit(stranger) == ""
    monkeypatch.setenv("PATH", "")
    assert environment_module.commit(file) == ""


def test_parts_are_noted_where_the_environment_changes_and_no_later():
    a, b = {"jax": "1", "date": "monday"}, {"jax": "2", "date": "tuesday"}
    first = environment_module.continued([], 0, a)
    assert first == [{"from_step": 0, **a}]
    assert environment_module.continued(first, 5, a | {"date": "friday"}) == first
    second = environment_module.continued(first, 5, b)
    assert second == [*first, {"from_step": 5, **b}]
    assert environment_module.continued(second, 3, a) == first  # the steps from 3 on are done again
    assert environment_module.continued(second, 0, b) == [{"from_step": 0, **b}]


def test_training_notes_what_it_runs_on(cfg, tmp_path):
    train.train(cfg, tmp_path, stop_at=1, devices=ONE)
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:2])
    Workdir(epath.Path(tmp_path), cfg).record_environment(1, mesh)
    parts = json.loads((tmp_path / "environment.json").read_text())
    found = [(part["from_step"], part["devices"]) for part in parts]
    assert found == [(0, "1 x cpu"), (1, "2 x cpu")]
    (tmp_path / "environment.json").write_text("[")
    with pytest.raises(SetupError, match=r"environment\.json cannot be read.*Remove it"):
        Workdir(epath.Path(tmp_path), cfg).record_environment(1, mesh)


@pytest.fixture
def jax_setting():
    """Changes a setting of JAX for one test."""
    before = {}

    def change(name, value):
        before[name] = getattr(jax.config, name)
        jax.config.update(name, value)

    yield change
    for name, value in before.items():
        jax.config.update(name, value)


CHANGED = [
    ("jax_threefry_partitionable", False),
    ("jax_default_prng_impl", "rbg"),
    ("jax_random_seed_offset", 1),
    ("jax_default_matmul_precision", "bfloat16"),
]


@pytest.mark.parametrize(("name", "value"), CHANGED)
def test_a_run_does_not_go_on_with_other_settings_of_jax(name, value, cfg, tmp_path, jax_setting):
    workdir, mesh = epath.Path(tmp_path), sharding.make_mesh(cfg.mesh)
    before = getattr(jax.config, name)
    Workdir(workdir, cfg).record_environment(0, mesh)
    noted = (tmp_path / "environment.json").read_text()
    jax_setting(name, value)
    with pytest.raises(SetupError, match=f"{name.upper()}: {before}; {value}"):
        Workdir(workdir, cfg).record_environment(3, mesh)
    assert (tmp_path / "environment.json").read_text() == noted
    Workdir(workdir, cfg).record_environment(0, mesh)  # nothing was done before
    Workdir(workdir, cfg).record_environment(5, mesh)
    assert json.loads((tmp_path / "environment.json").read_text())[0][name] == str(value)


def test_a_run_that_noted_no_settings_goes_on(cfg, tmp_path):
    (tmp_path / "environment.json").write_text(json.dumps([{"from_step": 0, "jax": "0.1"}]))
    Workdir(epath.Path(tmp_path), cfg).record_environment(3, sharding.make_mesh(cfg.mesh))
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 2


@pytest.mark.parametrize(
    "objective",
    [
        SupMIMConfig(),
        SupMIMConfig(target=PixelsConfig()),
        CMAEConfig(),
        VQGANObjectiveConfig(tokenizer=VQGANConfig(filters=32, multipliers=(1, 1, 2), codes=8)),
    ],
    ids=lambda x: x.name,
)
def test_types_do_not_depend_on_jax_enable_x64(objective, cfg, one_device, jax_setting):
    model = {"pooling": "cls", "positions": "learned", "layer_scale": 1e-4}
    data = {"crop": "contrastive"} if objective.name == "cmae" else {}
    cfg = changed(cfg, model=model, data=data, objective=objective)
    jax_setting("jax_enable_x64", True)
    prog = TrainStep.build(cfg, one_device)
    found = {str(x.dtype) for x in jax.tree.leaves((prog.state, prog.frozen))}
    assert found == {"float32", "int32"}


def test_what_the_code_relies_on_is_so_whatever_the_environment_says(data_dir, tmp_path):
    flags = ["--config.model.width=16", "--config.epochs=1", "--config.model.layer_scale=0.1"]
    flags += ["--config.eval.which=('top1',)"]
    env = {"JAX_ENABLE_X64": "1", "JAX_NUMPY_DTYPE_PROMOTION": "strict"}
    env["JAX_NUMPY_RANK_PROMOTION"] = "raise"
    found = []
    for name, given in (("plain", {}), ("set", env)):
        out = python(*train_command(tmp_path / name, data_dir, *flags), **given)
        assert out.returncode == 0, out.stderr
        state = tmp_path / name / "checkpoints" / "4" / "state"
        found.append(jax.tree.leaves(ocp.PyTreeCheckpointer().restore(state)))
    plain, other = found
    assert [x.dtype for x in plain] == [x.dtype for x in other] and same(plain, other)


def test_steps_of_a_command_on_a_cpu_reuse_memory():
    code = (
        "import resource, sys\n"
        "sys.argv = ['-m']  # as while Python looks for the module of a command\n"
        "from supmim_jax import train\n"
        "import jax, jax.numpy as jnp\n"
        "step = jax.jit(lambda x: jnp.sin(x @ x.T) @ x)\n"
        "x = jnp.ones((4096, 32))\n"
        "def faults():\n"
        "    for _ in range(20):\n"
        "        step(x).block_until_ready()\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "before = faults()\n"
        "print(faults() - before)\n"
    )
    out = python("-c", code, JAX_PLATFORMS="cpu")
    assert out.returncode == 0, out.stderr
    # 20 steps with an array of 16,384 pages each; blocks of other threads may cost a few new ones
    assert int(out.stdout) < 5 * 16384


@pytest.mark.parametrize(
    ("command", "platforms"), [("train", "cuda"), ("train", "nonsense"), ("cache_tokens", "tpu")]
)
def test_a_device_that_is_not_there(command, platforms, tmp_path):
    if platforms in {x.platform for x in jax.devices()}:
        pytest.skip("it is there")
    flags = ["--config=configs/debug.py", f"--workdir={tmp_path}/run"]
    if command == "cache_tokens":
        flags = [flags[0], f"--cache={tmp_path}/run", "--epochs=1"]
    out = python("-m", f"supmim_jax.{command}", *flags, JAX_PLATFORMS=platforms)
    assert out.returncode == 2 and "Traceback" not in out.stderr
    assert f"JAX_PLATFORMS is '{platforms}'" in out.stderr and "There is cpu" in out.stderr


def test_a_device_that_another_process_has_may_be_there_the_next_time():
    code = (
        "import jax\n"
        "from jax._src import xla_bridge\n"
        "from supmim_jax import cli\n"
        "def busy():\n"
        "    raise RuntimeError('The TPU is already in use by process with pid 7')\n"
        "xla_bridge.register_backend_factory('busy', busy)\n"
        "cli.start(jax.devices)\n"
    )
    out = python("-c", code, JAX_PLATFORMS="busy")
    assert out.returncode == 1 and "pid 7" in out.stderr and "Traceback" not in out.stderr
