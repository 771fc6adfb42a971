"""The one train step, and the one inference program, as jitted functions and abstract values.

`build` touches neither data nor device memory: `train` runs its step, `rehearse` compiles it for
hardware that isn't there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from supmim_jax import optim, sharding
from supmim_jax.config import Config
from supmim_jax.models import tokenizer
from supmim_jax.models.variables import Frozen, Moving, freeze
from supmim_jax.models.vit import Classifier, pixels
from supmim_jax.objectives import OBJECTIVES
from supmim_jax.types import Batch, Features, Metrics, TrainState

INIT, STEPS = 0, 1  # folded into the seed's key: two streams that never meet


@dataclass(frozen=True)
class Program:
    """Training: `init(key) -> state`, `step(state, batch, frozen) -> (state, metrics)`.

    `state`, `batch` and `frozen` are abstract values (shapes, dtypes, shardings); `step` donates
    its state. nnx.merge(graph, params, moving, frozen) is the objective again.
    """

    init: Callable[[jax.Array], TrainState]
    step: Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]
    state: TrainState
    batch: Batch
    frozen: Any
    graph: nnx.GraphDef


def build(cfg: Config, mesh: Mesh) -> Program:
    """The training program of `cfg` on `mesh`.

    Raises:
      ConfigError: the mesh does not divide the batch or a parameter.
    """
    sharding.check_batch(cfg.batch_size, mesh, "config.batch_size")
    transform = optim.make(cfg)
    learning_rate = optim.schedule(cfg)

    def split(key) -> tuple[nnx.GraphDef, Any, Any, Any]:
        with nnx.use_eager_sharding(False):
            return parts(OBJECTIVES[cfg.objective.name](cfg, rngs=nnx.Rngs(key)))

    def init(key) -> TrainState:
        _, params, moving, _ = split(jax.random.fold_in(key, INIT))
        return TrainState(jnp.zeros((), jnp.int32), params, moving, transform.init(params))

    graph, _, _, frozen = jax.eval_shape(split, jax.random.key(0))
    state = sharding.shard_like_params(jax.eval_shape(init, jax.random.key(0)), mesh)

    def step(state: TrainState, batch: Batch, frozen) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(cfg.seed), STEPS)
        key = jax.random.fold_in(key, state.step)

        def loss(params):
            objective = nnx.merge(graph, params, state.moving, frozen)
            value, metrics = objective.loss(batch, key)
            return value, (metrics, *parts(objective)[1:3])

        # A loss may overwrite variables; the update is then added to what it left.
        grads, (metrics, params, moving) = jax.grad(loss, has_aux=True)(state.params)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": learning_rate(state.step),
        }
        params = optax.apply_updates(params, updates)
        return TrainState(state.step + 1, params, moving, opt_state), metrics

    layout = jax.tree.map(lambda x: x.sharding, state)
    return Program(
        init=jax.jit(init, out_shardings=layout),
        step=jax.jit(step, out_shardings=(layout, None), donate_argnums=0),
        state=state,
        batch=abstract_batch(cfg, cfg.batch_size, mesh),
        frozen=sharding.replicated(frozen, mesh),
        graph=graph,
    )


def parts(objective: nnx.Module) -> tuple[nnx.GraphDef, Any, Any, Any]:
    """The graph, and trained, moving and frozen variables as plain nested dicts."""
    graph, *states = nnx.split(objective, nnx.Param, Moving, Frozen)
    return graph, *(nnx.to_pure_dict(state) for state in states)


def abstract_batch(cfg: Config, batch_size: int, mesh: Mesh) -> Batch:
    """Shapes, dtypes and shardings of a global training batch."""
    rows = NamedSharding(mesh, sharding.BATCH)
    size = cfg.data.image_size

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=rows)

    images = array(jnp.uint8, size, size, cfg.data.channels)
    return Batch(
        (images,),
        array(jnp.int32),
        array(jnp.float32),
        array(jnp.int32),
        target=images if cfg.needs_target else None,
        tokens=array(jnp.uint16, (size // cfg.model.patch) ** 2) if cfg.tokens.cache else None,
    )


@dataclass(frozen=True)
class Inference:
    """Evaluation: `features(params, images) -> Features`.

    The same program whatever the training objective: `params` (abstract) are `encoder` and `head`
    alone, and `images` (abstract) is a global batch of uint8 images.
    """

    features: Callable[[Any, jax.Array], Features]
    params: Any
    images: jax.ShapeDtypeStruct

    def bind(self, params: Any) -> "BoundEncoder":
        """The encoder with the inference part of a train state's `params`."""
        return BoundEncoder(self, {name: params[name] for name in self.params})


def build_inference(cfg: Config, batch_size: int, mesh: Mesh) -> Inference:
    """The inference program of the encoder that `cfg` trains."""
    sharding.check_batch(batch_size, mesh, "config.eval.batch_size")

    def split():
        with nnx.use_eager_sharding(False):
            graph, params = nnx.split(Classifier(cfg.model, cfg.data, rngs=nnx.Rngs(0)), nnx.Param)
        return graph, nnx.to_pure_dict(params)

    graph, params = jax.eval_shape(split)

    def features(params, images) -> Features:
        return nnx.merge(graph, params).features(images)

    return Inference(
        features=jax.jit(features),
        params=sharding.shard_like_params(params, mesh),
        images=abstract_batch(cfg, batch_size, mesh).views[0],
    )


@dataclass(frozen=True)
class BoundEncoder:
    """An inference program with its weights: the `Encoder` that evaluators are given."""

    inference: Inference
    params: Any

    def features(self, images: jax.Array) -> Features:
        return self.inference.features(self.params, images)


@dataclass(frozen=True)
class TokenizerProgram:
    """An image tokenizer as jitted functions of its arrays; `arrays` and `images` are abstract.

    encode(arrays, uint8 images) -> int32 ids BxL; decode(arrays, ids) -> float images in [-1, 1].
    """

    encode: Callable[[Any, jax.Array], jax.Array]
    decode: Callable[[Any, jax.Array], jax.Array]
    num_codes: int
    arrays: Any
    images: jax.ShapeDtypeStruct

    @property
    def params(self) -> dict:
        """The part of a train state's `params` that `bind` takes, abstract."""
        return {"tokenizer": self.arrays}

    def bind(self, params: Any) -> "BoundTokenizer":
        """The tokenizer with the weights of a train state's `params`."""
        return BoundTokenizer(self, params["tokenizer"])


@dataclass(frozen=True)
class BoundTokenizer:
    """A tokenizer program with its arrays: the `Tokenizer` that evaluators are given."""

    program: TokenizerProgram
    arrays: Any

    @property
    def num_codes(self) -> int:
        return self.program.num_codes

    def encode(self, images: jax.Array) -> jax.Array:
        return self.program.encode(self.arrays, images)

    def decode(self, ids: jax.Array) -> jax.Array:
        return self.program.decode(self.arrays, ids)


def build_tokenizer(cfg: Config, batch_size: int, mesh: Mesh) -> TokenizerProgram:
    """The tokenizer whose tokens are the target of `cfg`, or which `cfg` trains."""
    sharding.check_batch(batch_size, mesh, "the batch of images to tokenise")
    section, patch = tokenizer_section(cfg)

    def split():
        with nnx.use_eager_sharding(False):
            made = tokenizer.make(section, patch, cfg.data, nnx.Rngs(0))
            freeze(made)
            graph, arrays = nnx.split(made, Frozen)
        return graph, nnx.to_pure_dict(arrays)

    graph, arrays = jax.eval_shape(split)
    return TokenizerProgram(
        encode=jax.jit(lambda arrays, images: nnx.merge(graph, arrays).encode(pixels(images))),
        decode=jax.jit(lambda arrays, ids: nnx.merge(graph, arrays).decode(ids)),
        num_codes=section.codes,
        arrays=sharding.replicated(arrays, mesh),
        images=abstract_batch(cfg, batch_size, mesh).views[0],
    )


def tokenizer_section(cfg: Config):
    """The tokenizer's own config, and the side of a token in pixels of the data's images."""
    if cfg.objective.name == "vqgan":
        return cfg.objective.tokenizer, cfg.objective.tokenizer.downsampling
    return cfg.objective.target, cfg.model.patch


def build_evaluation(cfg: Config, batch_size: int, mesh: Mesh) -> Inference | TokenizerProgram:
    """What evaluations of a run of `cfg` need: its encoder, or the tokenizer that it trains."""
    build_it = build_tokenizer if cfg.objective.name == "vqgan" else build_inference
    return build_it(cfg, batch_size, mesh)
