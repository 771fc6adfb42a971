"""The schema, its one door, and every file in configs/."""

import ast
import dataclasses
from pathlib import Path

import jax
import pytest
from conftest import REPOSITORY, UNUSED_BY_STEP, make_batch, make_frozen

from supmim_jax import cli, config
from supmim_jax.config import Config, SupervisedConfig, SupMIMConfig, configdict
from supmim_jax.errors import ConfigError
from supmim_jax.train_step import TrainStep

NAMES = sorted(p.stem for p in Path(REPOSITORY, "configs").glob("*.py") if p.stem != "base")


def load(name: str, arg: str = "") -> Config:
    return configdict.from_configdict(cli.load(f"{REPOSITORY}/configs/{name}.py:{arg}"))


@pytest.mark.parametrize("objective", [SupervisedConfig(), SupMIMConfig()])
def test_a_config_comes_back_through_the_door(objective):
    cfg = Config(seed=3, objective=objective)
    assert configdict.from_configdict(configdict.to_configdict(cfg)) == cfg


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("objective.mask_ratio", 75.0, "config.objective.mask_ratio is 75.0; it must be 0.01 to"),
        ("objective.name", "simclr", "config.objective.name is 'simclr'; known are 'supervised'"),
        ("objective.encoder_input", "half", "known are 'masked', 'visible'"),
        ("model.depth", 2.5, "config.model.depth is 2.5 of type float; it must be int"),
        ("model.heads", 3, "config.model: width is 64, not a multiple of heads = 3"),
        ("model.patch", 3, "data.image_size is 20, not a multiple of model.patch = 3; 18 or 21"),
        ("model.patch", 20, "nothing is left to mask"),
        ("data.augment", "rand_augment", "which needs channels = 3, not 1"),
        ("data.image_size", 21, "24 would do"),
        ("data.image_size", 28, "config.data: eval_resize is 24"),
        ("data.flip", 1, "config.data.flip is 1 of type int; it must be bool"),
        ("data.channels", 2, "config.data.channels is 2; known are 1, 3"),
        ("optim.lr", float("nan"), "config.optim.lr is nan"),
        ("seed", True, "config.seed is True of type bool; it must be int"),
        ("batch_size", 0, "config.batch_size is 0; it must be 1 or more"),
        ("model", 5, "config.model is 5, but it is a section (ViTConfig)"),
        (
            "eval.which",
            ["knn", "top5"],
            "config.eval.which[1] is 'top5'; known are 'top1', 'miou', 'knn'",
        ),
        ("eval.which", [], "config.eval.which is []; it must be a tuple of one or more entries"),
        ("eval.which", ["segmentation"], "'segmentation', but data.masks.field is empty"),
        ("eval.knn.ks", (5, 0), "config.eval.knn.ks[1] is 0; it must be 1 or more"),
        ("epochs", float("inf"), "config.epochs is inf; it must be 0.0 to 3.4e+38"),
        (
            "epochs",
            1e38,
            "epochs is 1e+38: of data.train_examples = 240 in batches of 64 these are",
        ),
        ("epochs", 10**400, "... of type int; it must be float"),
        ("optim.lr", 1e-40, "config.optim.lr is 1e-40; a float32 holds 0, or 1.2e-38 and more"),
        ("optim.final_lr", 0.1, "optim.final_lr is 0.1, above the peak of 0.001"),
        ("optim.b1", 1.0, "config.optim.b1 is 1.0; it must be 0.0 to 0.999999"),
        ("batch_size", 2**31, "config.batch_size is 2147483648; it must be 1 to 2147483647"),
        ("model.width", 10**9, "config.model.width is 1000000000; it must be 1 to 65536"),
        ("data.channels", 1.0, "config.data.channels is 1.0; known are 1, 3"),
        ("objective.name", [], "config.objective.name is []; known are 'supervised'"),
        ("objective.name", "mae", "name is 'mae', but the other fields are those of 'supmim'"),
        ("objective", {"name": {}}, "config.objective.name is {}; known are 'supervised'"),
        ("data.name", "a\nb", "config.data.name is 'a\\nb', which has control characters"),
        ("data.name", "\ud800", "or is not Unicode; it must be one line of text"),
        ("tokens.cache", "a" * 3000, "config.tokens.cache has 3000 characters; it must have 1000"),
        ("data.a\x1b[2J", 1, r"config.data.'a\x1b[2J' does not exist"),
    ],
)
def test_a_bad_value_is_named_with_what_would_do(path, value, message):
    values = configdict.to_configdict(Config()).to_dict()
    *parents, key = path.split(".")
    section = values
    for parent in parents:
        section = section[parent]
    section[key] = value
    with pytest.raises(ConfigError) as error:
        configdict.from_configdict(values)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": "64"}, "batch_size is '64' of type str; it must be int"),
        ({"epochs": "3"}, "epochs is '3' of type str; it must be float"),
        ({"optim": {"lr": "1e-3"}}, "optim.lr is '1e-3' of type str; it must be float"),
        ({"data": {"train_examples": None}}, "data.train_examples is None of type NoneType; it"),
    ],
)
def test_a_change_of_another_type_names_the_field(fields, message):
    with pytest.raises(ConfigError) as error:
        config.changed(Config(), **fields)
    assert message in str(error.value)
    assert config.changed(Config(), epochs=3).epochs == 3


def test_a_typo_is_answered_with_the_known_key():
    values = configdict.to_configdict(Config()).to_dict()
    values["objective"]["mask_raito"] = 0.5
    with pytest.raises(ConfigError, match=r"Did you mean config\.objective\.mask_ratio\?"):
        configdict.from_configdict(values)


SUPMIM = Config()
VQGAN = config.changed(
    SUPMIM, data={"image_size": 32, "eval_resize": 32}, objective=config.VQGANObjectiveConfig()
)
PIXELS = {"target": config.PixelsConfig()}
BEST = {"eval": {"every": 1}, "checkpoint": {"keep_best": "x"}}
TOGETHER = [
    (SUPMIM, {"objective": config.MAEConfig(), "model": {"patch": 1}}, "has no deviation"),
    (SUPMIM, {"objective": PIXELS, "model": {"patch": 1}}, "has no deviation"),
    (SUPMIM, {"objective": {"mask_ratio_std": 0.2, "encoder_input": "visible"}}, "std is 0.2 with"),
    (SUPMIM, {"objective": {"mask_ratio_std": 0.2, "mask_ratio": 0.4}}, "mask_ratio is 0.4"),
    (SUPMIM, {"objective": PIXELS | {"token_smoothing": 0.1}}, "token_smoothing is 0.1"),
    (
        SUPMIM,
        {"batch_size": 10**9, "optim": {"lr": 1e35, "lr_batch": 1}},
        "optim.lr is 1e+35 at optim.lr_batch = 1, which is 1e+44",
    ),
    (SUPMIM, {"init": {"head": "keep"}}, "names no run"),
    (SUPMIM, {"model": {"position_grid": 5}}, "must be 0 with learned positions"),
    (SUPMIM, {"checkpoint": {"every": 500, "keep_every": 750}}, "750, not a multiple of every"),
    (SUPMIM, {"checkpoint": {"keep_best": "knn"}}, "keep_best is 'knn', but eval.every is 0"),
    (SUPMIM, BEST, "'x'; the evaluations of this run give 'top1', 'knn'."),
    (SUPMIM, BEST | {"objective": config.MAEConfig()}, "this run give 'knn'."),
    (VQGAN, BEST, "this run give 'psnr', 'codes_used', 'perplexity'."),
    (VQGAN, {"optim": {"layer_decay": 0.5}}, "layer_decay must be 1 with objective 'vqgan'"),
    (VQGAN, {"optim": {"accumulate": 2}}, "accumulate must be 1 with objective 'vqgan'"),
    (VQGAN, {"objective": {"perceptual": {"weight": 1.0}}}, "names no encoder"),
    (VQGAN, {"objective": {"tokenizer": {"groups": 3}}}, "not a multiple of groups = 3"),
    (VQGAN, {"objective": {"tokenizer": {"path": "x"}}}, "this run trains the tokenizer"),
    (VQGAN, {"objective": {"tokenizer": {"multipliers": (1,) * 11}}}, "multipliers has 11 entries"),
    (
        VQGAN,
        {"objective": {"tokenizer": {"multipliers": (1,) * 7}}},
        "image_size is 32, but objective.tokenizer makes tokens of 64",
    ),
]


@pytest.mark.parametrize(("base", "changes", "message"), TOGETHER)
def test_values_that_do_not_go_together_are_refused(base, changes, message):
    with pytest.raises(ConfigError) as error:
        config.changed(base, **changes)
    assert message in str(error.value)


def test_derived_values_follow_an_override():
    data, optim = config.DataConfig(train_examples=600), config.OptimConfig(lr=1.0, lr_batch=400)
    cfg = Config(batch_size=100, epochs=10, data=data, optim=optim)
    assert (cfg.total_steps, cfg.warmup_steps, cfg.peak_lr) == (60, 30, 0.25)
    assert dataclasses.replace(cfg, epochs=1.0).warmup_steps == 5  # below the total of 6


def test_differences_name_the_paths():
    a = configdict.to_configdict(Config()).to_dict()
    b = configdict.to_configdict(Config(seed=1, model=config.ViTConfig(depth=5))).to_dict()
    assert configdict.differences(a, b) == ["config.model.depth: 4; 5", "config.seed: 0; 1"]


def test_every_field_is_read_somewhere():
    read = set()
    for path in Path(REPOSITORY, "supmim_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    kinds = [k for k in vars(config).values() if dataclasses.is_dataclass(k)]
    fields = {f"{kind.__name__}.{f.name}" for kind in kinds for f in dataclasses.fields(kind)}
    assert not {name for name in fields if name.split(".")[1] not in read}


@pytest.mark.parametrize("name", NAMES)
def test_every_config_file_loads_builds_and_lowers(name, one_device):
    source = Path(REPOSITORY, "configs", f"{name}.py").read_text()
    assert name == "base" or all(x in source for x in (f"configs/{name}.py", "Hardware:"))
    built = TrainStep.build(load(name), one_device)
    built.step.lower(built.state, built.batch, built.frozen)


@pytest.mark.parametrize("runs", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_debug_shrinks_every_experiment_to_a_small_step(one_device, runs):
    """All are built; of each objective, optimizer and form of a loss the smallest is traced or run.

    Other tests run a step of each.
    """
    shrunk = [dataclasses.replace(load(name, "debug"), batch_size=4) for name in NAMES]
    seen, tried = set(), 0
    for cfg in sorted(shrunk, key=lambda cfg: cfg.data.image_size):
        built = TrainStep.build(cfg, one_device)
        assert cfg.model.depth == 2
        forms = [getattr(cfg.objective, x, None) for x in ("encoder_input", "mask_ratio_std")]
        target = type(getattr(cfg.objective, "target", None))
        new = {*enumerate((cfg.objective.name, cfg.optim.name, target, *forms))} - seen
        if not new:
            continue
        if runs:
            state = built.init(jax.random.key(0))
            state, metrics = built.step(state, make_batch(cfg), make_frozen(cfg))
            assert int(state.step) == 1 and all(abs(float(x)) < 1e4 for x in metrics.values())
        else:
            built.step.trace(built.state, built.batch, built.frozen)
        seen, tried = seen | new, tried + 1
    assert tried > 7


def test_debug_leaves_out_what_needs_a_file_or_many_devices():
    sections = {"tokens": {"cache": "elsewhere"}, "init": {"checkpoint": "elsewhere"}}
    sections |= {"eval": {"every": 9}, "checkpoint": {"keep_best": "knn"}, "mesh": {"fsdp": 16}}
    found = config.debug(config.changed(SUPMIM, **sections))
    assert (found.tokens.cache, found.init.checkpoint, found.objective.target.path) == ("", "", "")
    assert found.mesh == config.MeshConfig()
    assert load("debug_pixels", "debug").objective.target == config.PixelsConfig()


def test_the_step_reads_no_section_that_shared_steps_leave_out(cfg, one_device):
    """Tests with `build_once` take another run's step for that of `cfg`."""
    sections = {
        "init": {"checkpoint": "elsewhere", "head": "keep"},
        "eval": {"every": 5},
        "log": {"every": 7},
        "checkpoint": {"every": 9, "keep": 3},
        "watch": {"roll_backs": 2},
    }
    assert sections.keys() == UNUSED_BY_STEP.keys()
    programs = []
    for run in (cfg, config.changed(cfg, **sections)):
        built = TrainStep.build(run, one_device)
        programs.append(built.step.lower(built.state, built.batch, built.frozen).as_text())
    assert programs[0] == programs[1]


def test_a_supmim_experiment_differs_from_its_twin_in_the_objective_only():
    for name in ("b14_imagenet1k", "l14_imagenet21k", "b14_imagenet1k_deit3"):
        supmim, twin = load(f"supmim_{name}"), load(f"supervised_{name}")
        assert dataclasses.replace(supmim, objective=twin.objective) == twin
        assert supmim.objective.classification == twin.objective.classification
