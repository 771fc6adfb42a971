"""Random overrides of configs: each is refused by name, or gives a run that can be traced.

  python tests/fuzz_config.py --examples 2000

Overrides go through ml_collections' flags, as from a command line, or into the dict of a saved
config. What is then accepted must have sane derived values, and its step must trace on 8 simulated
devices, or be refused by name when it is built; arrays are abstract, nothing is computed. Steps of
sizes that only a tracer's patience would notice are accepted and not traced.
"""

import argparse
import copy
import math
import os
import sys
import time
import traceback
import types
import typing
from collections import Counter
from dataclasses import fields, is_dataclass
from typing import Any, Literal
from unittest import mock

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
from absl import flags
from conftest import REPOSITORY
from flax.traverse_util import flatten_dict
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_flags

from supmim_jax import cli, encoder, optim, sharding
from supmim_jax.config import INF, Config, VQGANConfig
from supmim_jax.config.configdict import from_configdict
from supmim_jax.errors import ConfigError, SetupError
from supmim_jax.train_step import TrainStep

BASES = (
    *(("debug", "debug"), ("debug_pixels", "debug"), ("debug_supervised", "debug")),
    *(("debug_vqgan", ""), ("vqgan_debug", "debug"), ("cmae_fractals", "debug")),
    *(("mae_b16_imagenet1k", "debug"), ("finetune_segmentation_ade20k", "debug")),
    *(("supmim_b14_imagenet1k", "debug"), ("supervised_b14_imagenet1k_deit3", "debug")),
)
ODD = (
    *("", " ", "nan", "inf", "-inf", "1e400", "-1e400", "1e308", "-1e308", "1e-320", "-0.0"),
    *("-1", "0", "1", "2", "3", "7", "2147483647", "2147483648", "9223372036854775808"),
    *("1" + 400 * "0", "None", "True", "false", "()", "(1,)", "(1, 2)", "('a',)", "[1]", "{}"),
    *("ünï", "\u202e", "\x00", "\ud800", "💥", "a" * 3000, "../../etc", "/", "'", '"', "%s"),
    *("{0}", "__class__", "1_000", "0x10", "\u0661", 90 * "(" + 90 * ")", "a\nb", "$HOME"),
)
PLAIN = (  # what a saved config's JSON may hold where another value should be
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 10**400, 0.5, math.nan, math.inf, -math.inf),
    *("", "x", "\ud800", [], [1], [[]], [None], [1, "a"], {}, {"name": []}, {"name": {}}, {"a": 1}),
)
INTS = (0, 1, 2, 3, 4, 5, 7, 8, 12, 16, 20, 24, 32, 64, 96, 100, 224, 640, 10**4, 10**6, 10**9)
FLOATS = (0.0, 1e-30, 1e-6, 0.01, 0.1, 0.25, 0.5, 0.75, 0.99, 1.0, 1.5, 3.0, 20.0, 1e4, 1e9, 1e38)
TRACED = 2e8  # parameters or values of one array; larger steps are not traced
LONGEST = 2.0  # seconds that a config may take to be refused or accepted


def load(name: str, arg: str) -> ConfigDict:
    return cli.load(f"{REPOSITORY}/configs/{name}.py:{arg}")


def leaves(kind: type, path: str = "") -> dict[str, Any]:
    """Hint and range of every field of the schema by its path; of a union, of all its members."""
    found = {}
    hints = typing.get_type_hints(kind)
    for spec in fields(kind):
        hint, where = hints[spec.name], f"{path}{spec.name}"
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        for member in members:
            if is_dataclass(member):
                found |= leaves(member, f"{where}.")
            else:
                found[where] = (member, spec.metadata.get("range", (None, None)))
    return found


SCHEMA = leaves(Config)


def of_type(hint: Any, span: tuple) -> st.SearchStrategy:
    """Values of the right type, in range or close to it, as Python values."""
    if typing.get_origin(hint) is Literal:
        return st.sampled_from(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return st.lists(of_type(typing.get_args(hint)[0], span), min_size=1, max_size=4).map(tuple)
    if hint is bool:
        return st.booleans()
    if hint is str:
        return st.sampled_from(("", "train", "test", "image", "segmentation", "runs/a", "x@3"))
    numbers = INTS if hint is int else FLOATS
    low, high = (-INF if x is None else x for x in span)
    edges = tuple(hint(x) for x in (low, high) if abs(x) != INF)
    inside = tuple(x for x in numbers if low <= x <= high) or edges
    return st.sampled_from((*5 * (*inside, *edges), *numbers))


def override(paths: list[str]) -> st.SearchStrategy:
    """A path and what to set it to: of its type, odd text, or a plain value that JSON can hold."""
    known = st.sampled_from(paths).flatmap(
        lambda path: st.tuples(
            st.just(path),
            of_type(*SCHEMA[path]) if path in SCHEMA else st.sampled_from(ODD),
        )
    )
    odd = st.tuples(st.sampled_from(paths), st.sampled_from(ODD))
    any_path = st.sampled_from((*SCHEMA, "objective", "model", "x", "data.x", "model.width.x", ""))
    strange = st.tuples(any_path, st.sampled_from(ODD))
    return st.sampled_from((*16 * (known,), odd, strange)).flatmap(lambda chosen: chosen)


def by_flags(base: ConfigDict, overrides: list[tuple[str, Any]]) -> ConfigDict | None:
    """The ConfigDict after --config.<path>=<value> of each; None where a flag is refused."""
    values = flags.FlagValues()
    given = ["program", *(f"--config.{path}={value}" for path, value in overrides)]
    try:
        with mock.patch.object(sys, "argv", given):  # where ml_collections looks for overrides
            config_flags.DEFINE_config_dict("config", copy.deepcopy(base), flag_values=values)
            values(given)
        return values.config
    except cli.MISTAKES:
        return None


def by_dict(base: ConfigDict, overrides: list[tuple[str, Any]]) -> dict:
    """The nested dict with each value in place, as config.json might hold it."""
    values = base.to_dict()
    for path, value in overrides:
        *parents, key = path.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {}) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section[key] = value
    return values


def outcome(base: ConfigDict, overrides: list[tuple[str, Any]], plain: bool) -> str:
    """What became of it; raises what a user should never see."""
    found = by_dict(base, overrides) if plain else by_flags(base, overrides)
    if found is None:
        return "refused as a flag"
    begin = time.monotonic()
    try:
        cfg = from_configdict(found)
    except ConfigError as error:
        assert "config" in str(error) and len(str(error)) < 2000, f"a poor message: {error}"
        return "refused by the schema"
    finally:
        assert time.monotonic() - begin < LONGEST, "the schema takes too long"
    check_derived(cfg)
    if size(cfg) > TRACED:
        return "accepted, too large to trace here"
    try:
        trace(cfg)
    except SetupError as error:
        assert "config" in str(error), f"a poor message: {error}"
        return "refused when built"
    return "accepted and traced"


def check_derived(cfg: Config) -> None:
    """Asserts that what follows from the config is of a run that could be."""
    assert 1 <= cfg.total_steps < 2**31 and 0 <= cfg.warmup_steps < cfg.total_steps
    assert math.isfinite(cfg.peak_lr) and 0 <= cfg.peak_lr < 3.5e38
    assert 1 <= cfg.num_views < 2**31 and cfg.steps_per_boxes >= 0
    rates = optim.schedule(cfg)
    at = (0, cfg.warmup_steps, cfg.total_steps // 2, cfg.total_steps - 1)
    assert all(0 <= float(rates(step)) <= 1.01 * cfg.peak_lr for step in at), "a strange rate"
    assert cfg.steps_per_boxes or not cfg.data.learns_boxes
    assert cfg.objective.crops in (1, 2) and cfg.data.image_size % cfg.model.patch == 0


def size(cfg: Config) -> float:
    """About the largest number of values that a trace of the step would name or loop over."""
    model, data, objective = cfg.model, cfg.data, cfg.objective
    tokens = (data.image_size // model.patch) ** 2
    pixels = data.image_size**2 * data.channels
    patch = model.patch**2 * data.channels
    widest = max(model.width, model.mlp_dim)
    sizes = [
        model.depth * (model.width * (4 * model.width + 2 * model.mlp_dim)),
        cfg.batch_size * max(tokens * widest, tokens * tokens * model.heads, pixels),
        model.width * max(data.num_classes, patch, tokens),
        cfg.batch_size * max(data.num_classes, cfg.batch_size),
        data.masks.num_classes * data.image_size**2 * cfg.batch_size * cfg.needs_masks,
        cfg.optim.accumulate,
    ]
    decoder = getattr(objective, "decoder", None)
    if decoder:
        wide = max(decoder.width, decoder.mlp_dim)
        outputs = getattr(getattr(objective, "target", None), "codes", patch)
        sizes += [
            decoder.depth * decoder.width * wide * 6,
            cfg.batch_size * tokens * max(wide, outputs, tokens * decoder.heads),
        ]
    for part in ("tokenizer", "target"):
        tokenizer = getattr(objective, part, None)
        if isinstance(tokenizer, VQGANConfig):
            inner = cfg.data.image_size if part == "tokenizer" else 0
            inner = inner or tokens**0.5 * tokenizer.downsampling
            top = tokenizer.filters * max(tokenizer.multipliers)
            loops = tokenizer.res_blocks * len(tokenizer.multipliers)
            sizes += [
                loops * 18 * top**2,
                cfg.batch_size * inner**2 * top,
                tokenizer.codes * tokenizer.code_dim,
                cfg.batch_size * tokens * max(tokenizer.codes, tokenizer.code_dim),
                loops * TRACED / 32,  # a loop of Python
            ]
    if contrastive := getattr(objective, "contrastive", None):
        sizes.append(contrastive.hidden * max(contrastive.hidden, contrastive.dim, model.width))
    if adversarial := getattr(objective, "adversarial", None):
        sizes.append(16 * (adversarial.filters * 8) ** 2 + cfg.batch_size * pixels)
    return max(sizes)


def trace(cfg: Config) -> None:
    """Traces start and step, abstractly."""
    mesh = sharding.run_mesh(cfg)
    built = TrainStep.build(cfg, mesh)
    state, metrics = jax.eval_shape(built.step, built.state, built.batch, built.frozen)
    assert jax.tree.structure(state) == jax.tree.structure(built.state)
    assert all(x.shape == () for x in metrics.values())
    found = encoder.build_evaluation(cfg, cfg.eval.batch_size, mesh)
    if cfg.objective.leaves == "tokenizer":
        jax.eval_shape(found.encode, found.arrays, found.images)
    else:
        jax.eval_shape(found.features, found.params, found.images)


def fuzz(examples: int, number: int = 0) -> tuple[Counter, dict[str, str]]:
    """Draws so many configs with the seed `number`.

    Returns:
      how often each thing happened, and every violation with what led to it.
    """
    bases = [load(*base) for base in BASES]
    paths = [sorted(flatten_dict(base.to_dict(), sep=".")) for base in bases]
    counts, violations = Counter(), {}

    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def one(data):
        i = data.draw(st.integers(0, len(bases) - 1))
        plain = data.draw(st.integers(0, 3)) == 0
        overrides = data.draw(st.lists(override(paths[i]), min_size=1, max_size=6))
        if plain and data.draw(st.booleans()):
            path = data.draw(st.sampled_from((*SCHEMA, "objective", "data", "objective.target")))
            overrides.append((path, data.draw(st.sampled_from(PLAIN))))
        counts[told(bases[i], BASES[i], overrides, plain, violations)] += 1

    one()
    return counts, violations


def told(base: ConfigDict, name: tuple, overrides: list, plain: bool, violations: dict) -> str:
    """The outcome; a violation is noted with the fewest of the overrides that show it."""
    try:
        return outcome(base, overrides, plain)
    except Exception as error:
        least = list(overrides)
        for one in overrides:
            fewer = [x for x in least if x is not one]
            try:
                outcome(base, fewer, plain)
            except Exception as again:
                if type(again) is type(error):
                    least = fewer
        where = [x for x in traceback.extract_tb(error.__traceback__) if "supmim_jax" in x.filename]
        at = f"{os.path.basename(where[-1].filename)}:{where[-1].lineno}" if where else "?"
        key = f"{type(error).__name__} at {at}: {str(error).strip()[:200]}"
        violations.setdefault(key, f"{name} {'dict' if plain else 'flags'} {least!r:.600}")
        return "VIOLATION"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given_ = parser.parse_args()
    begin = time.monotonic()
    counts, violations = fuzz(given_.examples, given_.seed)
    print(f"{counts.total()} configs, seed {given_.seed}:")
    print(*(f"  {count:>6}  {what}" for what, count in counts.most_common()), sep="\n")
    print(*(f"\n{k}\n  {v}" for k, v in violations.items()), sep="\n")
    print(f"{time.monotonic() - begin:.0f} s")
    return int(bool(violations))


if __name__ == "__main__":
    sys.exit(main())
