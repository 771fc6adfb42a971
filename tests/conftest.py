"""Every test runs on simulated CPU devices and on images that it makes."""

import os
import tempfile
from importlib import metadata
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Programs that several tests, or the commands that they start, compile alike are compiled once.
if "PYTEST_XDIST_WORKER" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="supmim_jax_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
# Threads of OpenMP spin while they wait for each other, and tests share their cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Of programs as small as these, in half the time; then, by another emitter, in a third of that.
FAST = "--xla_backend_optimization_level=0"
if metadata.version("jaxlib").startswith("0.10."):  # an unknown flag would end the process
    FAST += " --xla_cpu_use_fusion_emitters=false"
for flag in ("--xla_force_host_platform_device_count=8", *FAST.split()):
    if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"

import dataclasses
import functools
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from pictures import CLASSES, ToyPictures, encoded, put

from supmim_jax import checkpoint, encoder, sharding
from supmim_jax.batch import Batch, TrainState
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DecoderConfig,
    EvalConfig,
    HeadTrainingConfig,
    InitConfig,
    LogConfig,
    MeshConfig,
    PatchCodesConfig,
    SegmentationConfig,
    SupervisedConfig,
    SupMIMConfig,
    ViTConfig,
    WatchConfig,
)
from supmim_jax.train_step import TrainStep

# Under nohup, or in the background of a shell, the tests and what they start would ignore these.
for number, default in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, default)

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ONE = jax.devices()[:1]
QUICK = SegmentationConfig(training=HeadTrainingConfig(steps=20))  # of the heads that a report fits
ON_ONE = sharding.make_mesh(MeshConfig(), ONE)


PLAIN = {"PYTHONPATH": REPOSITORY, "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": FAST}


@functools.cache
def forks() -> subprocess.Popen:
    """The process of forks.py."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, f"{REPOSITORY}/tests/forks.py"]
    return subprocess.Popen(command, env=os.environ | PLAIN, start_new_session=True, **pipes)


def python(*arguments, cwd=REPOSITORY, **env: str) -> subprocess.CompletedProcess:
    """A process of Python with one device, and what it printed.

    A command is run by forks.py, unless `env` sets what JAX or OpenCV reads as it is imported.
    """
    command, env = [sys.executable, *map(str, arguments)], PLAIN | env
    changed = {x for x in env if x.startswith(("JAX_", "OPENCV_")) and env[x] != PLAIN.get(x)}
    if arguments[0] != "-m" or changed - {"JAX_NUM_CPU_DEVICES"}:
        options = {"capture_output": True, "text": True, "timeout": 300}
        return subprocess.run(command, cwd=cwd, env=os.environ | env, **options)
    server, asked = forks(), {"arguments": command[1:], "cwd": str(cwd), "env": os.environ | env}
    with tempfile.TemporaryDirectory() as directory:
        asked["out"], asked["err"] = out, err = [f"{directory}/{x}" for x in ("out", "err")]
        late = threading.Timer(300, os.killpg, (server.pid, signal.SIGKILL))
        late.start()
        print(json.dumps(asked), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        late.cancel()
        printed = [Path(x).read_text() for x in (out, err)]
    return subprocess.CompletedProcess(command, code, *printed)


def train_command(workdir, data_dir, *more: str, config="debug_supervised") -> list[str]:
    """The arguments of a small run, for `python`."""
    return [
        *("-m", "supmim_jax.train", f"--config=configs/{config}.py", f"--workdir={workdir}"),
        *(f"--config.data.data_dir={data_dir}", "--config.model.depth=1", "--config.log.every=1"),
        "--config.eval.segmentation.training.steps=20",
        *more,
    ]


def restored(workdir, step, like):
    """The state and the numbers of a saved step."""
    saved = Checkpoint.read(epath.Path(workdir) / "checkpoints" / str(step))
    return saved.restore_state(like), saved.run


def final_state(cfg: Config, workdir) -> tuple[dict, dict]:
    """The newest saved state of a run on the host, and its numbers."""
    like = TrainStep.build(cfg, ON_ONE).state
    state, run = restored(workdir, checkpoint.steps(workdir)[-1], like)
    return jax.tree.map(np.asarray, checkpoint.plain(state)), run


def metric_lines(workdir) -> list[dict]:
    """The lines of metrics.jsonl, but for what is of the machine."""
    lines = (epath.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    timing = ("images_per_second", "data_wait")
    return [{k: v for k, v in json.loads(x).items() if k not in timing} for x in lines]


def same(a, b) -> bool:
    """Whether two trees have the same structure and arrays."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the long soak tests")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a long soak test; a short form of it always runs")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="long; run with --slow"))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> str:
    """A directory of its own for the built-in data set, built once per session."""
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """An empty bucket of an emulator, which is there for this process and those that it starts."""
    import gcs

    with gcs.server() as environment, pytest.MonkeyPatch.context() as patched:
        for name, value in environment.items():
            patched.setenv(name, value)
        yield f"gs://{gcs.BUCKET}"


@pytest.fixture(scope="session")
def cfg(data_dir) -> Config:
    """A SupMIM run of 12 steps on the first 64 images of fractals/tiny."""
    return Config(
        batch_size=16,
        epochs=3,
        data=DataConfig(data_dir=data_dir, train_split="train[:64]", train_examples=64),
        model=ViTConfig(width=32, depth=2, mlp_dim=64, heads=2, drop_path=0.1),
        objective=SupMIMConfig(
            decoder=DecoderConfig(width=32, mlp_dim=64, heads=2),
            target=PatchCodesConfig(codes=16, fit_images=64),
        ),
        eval=EvalConfig(batch_size=64, segmentation=QUICK),
        log=LogConfig(every=2),
        checkpoint=CheckpointConfig(every=4),
    )


@pytest.fixture(scope="session")
def supervised(cfg) -> Config:
    return dataclasses.replace(cfg, objective=SupervisedConfig())


@pytest.fixture
def one_device():
    return ON_ONE


BUILD, BUILD_ENCODER = map(functools.cache, (TrainStep.build, encoder.build_encoder))
UNUSED_BY_STEP = {
    "init": InitConfig(),
    "eval": EvalConfig(),
    "log": LogConfig(),
    "checkpoint": CheckpointConfig(),
    "watch": WatchConfig(),
}


@pytest.fixture
def build_once(monkeypatch) -> None:
    """Runs with the same step, encoder and mesh share them, compiled, also between tests."""

    def build(cfg: Config, mesh) -> TrainStep:
        return BUILD(dataclasses.replace(cfg, **UNUSED_BY_STEP), mesh)

    def build_encoder(cfg: Config, batch_size: int, mesh) -> encoder.EncoderProgram:
        return BUILD_ENCODER(dataclasses.replace(cfg, **UNUSED_BY_STEP), batch_size, mesh)

    monkeypatch.setattr(TrainStep, "build", build)
    monkeypatch.setattr(encoder, "build_encoder", build_encoder)


def save(cfg: Config, workdir, state: TrainState) -> str:
    """The --workdir of a run of `cfg` with a checkpoint of this state."""
    checkpoints = checkpoint.Checkpoints(workdir, cfg.checkpoint)
    position = int(state.step) * cfg.batch_size
    run = checkpoint.BEGIN | {"position": position, "seconds": 1.5 * int(state.step)}
    checkpoints.save(state, cfg, run)
    checkpoints.close()
    return str(workdir)


def save_initial(cfg: Config, workdir) -> str:
    """The --workdir of a run of `cfg` that has not begun to learn."""
    return save(cfg, workdir, TrainStep.build(cfg, ON_ONE).init(jax.random.key(0)))


def random_state(cfg: Config, step: int) -> TrainState:
    """A state after `step` of random numbers, on one device."""
    random, like = np.random.default_rng(step), TrainStep.build(cfg, ON_ONE).state
    state = jax.tree.map(lambda x: 0.1 * random.normal(size=x.shape), like).replace(step=step)
    return sharding.put(state, like)


@pytest.fixture
def initial(cfg, tmp_path) -> str:
    return save_initial(cfg, tmp_path / "run")


def make_photos(root: Path) -> Path:
    """Training and validation images of three classes; deep, in both formats and any case."""
    for label, name in enumerate(CLASSES):
        for i in range(12):
            ending = (".png", ".JPG", ".jpeg")[i % 3]
            sub = "" if i % 2 else "deep/er/"
            put(root / "train" / name / f"{sub}{i:02d}{ending}", encoded(100 * label + i, ending))
        for i in range(3):
            put(root / "val" / name / f"{i}.Png", encoded(1000 + 10 * label + i))
    put(root / "train" / "ape" / "notes.txt", "no image")
    put(root / "train" / "ape" / ".hidden.png", "no image either")
    return root


@pytest.fixture
def photos(tmp_path) -> Path:
    return make_photos(tmp_path / "photos")


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """A TFRecord copy in four shards of train."""
    root = tmp_path_factory.mktemp("tfrecord")
    builder = ToyPictures(data_dir=root, file_format="tfrecord")
    config = tfds.download.DownloadConfig(num_shards=4, try_download_gcs=False)
    builder.download_and_prepare(download_config=config)
    return root


@pytest.fixture
def toy(toys, tmp_path):
    """Its version's directory, to be broken."""
    copy = tmp_path / "tfrecord" / "toy_pictures" / "2.3.4"
    shutil.copytree(toys / "toy_pictures" / "2.3.4", copy)
    return epath.Path(copy)


def make_batch(cfg: Config, seed: int = 0) -> Batch:
    """A batch of noise images on the host."""
    random = np.random.default_rng(seed)
    size = cfg.data.image_size
    shape = (cfg.batch_size, size, size, cfg.data.channels)
    views = tuple(random.integers(0, 256, shape, np.uint8) for _ in range(cfg.objective.crops))
    ids = np.arange(cfg.batch_size, dtype=np.int32)
    batch = Batch(views, ids % cfg.data.num_classes, np.ones(cfg.batch_size, np.float32), ids)
    if cfg.needs_masks:
        shape = (cfg.batch_size, size, size)
        masks = random.integers(0, cfg.data.masks.num_classes, shape, np.int32)
        return dataclasses.replace(batch, masks=masks)
    return dataclasses.replace(batch, target=views[0]) if cfg.needs_target else batch


def make_frozen(cfg: Config, seed: int = 0) -> dict:
    """Random frozen arrays for the step of `cfg`; {} where it has none."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: random.uniform(-1, 1, x.shape).astype(np.float32),
        TrainStep.build(cfg, ON_ONE).frozen,
    )


def train_on(cfg: Config, mesh, batches: Iterable[Batch]) -> tuple[TrainState, list[dict]]:
    """The state after a step on each batch, from the beginning, and the metrics of each."""
    built = TrainStep.build(cfg, mesh)
    state, found = built.init(jax.random.key(0)), []
    frozen = sharding.put(make_frozen(cfg), built.frozen)
    for batch in batches:
        state, metrics = built.step(state, sharding.put(batch, built.batch), frozen)
        found.append({name: float(value) for name, value in metrics.items()})
    return state, found


def make_clusters(count: int, classes: int = 5, dim: int = 16, spread: float = 0.2, seed: int = 0):
    """Features around one centre per class, and their labels; the centres are always the same."""
    centres = np.random.default_rng(0).normal(size=(classes, dim))
    random = np.random.default_rng([seed, 1])
    labels = random.integers(0, classes, count)
    features = centres[labels] + spread * random.normal(size=(count, dim))
    return features.astype(np.float32), labels


def make_params(cfg: Config, seed: int = 0) -> dict:
    """Random encoder and head on the host, biases and norms too; activations are of order 1.

    Embeddings are small, as at the start of training, so that the LayerNorms' epsilon shows.
    """
    rng = np.random.default_rng(seed)

    def draw(path, like):
        x = rng.normal(size=like.shape)
        name = path[-1].key
        if name == "kernel":
            x /= np.sqrt(like.shape[-2])
        elif name.startswith("scale"):
            x = 1 + 0.3 * x
        else:
            x *= 0.3
        if any(key.key in ("patches", "positions", "cls") for key in path):
            x *= 0.02
        return x.astype(np.float32)

    params = encoder.build_encoder(cfg, 1, ON_ONE).params
    return jax.tree_util.tree_map_with_path(draw, params)


def make_features(cfg: Config, params: dict, images: np.ndarray):
    """What our inference program makes of uint8 images."""
    with jax.default_matmul_precision("highest"):
        return encoder.build_encoder(cfg, len(images), ON_ONE).features(params, images)
