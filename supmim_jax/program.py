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
from supmim_jax.models.patch_codes import Frozen
from supmim_jax.models.vit import Classifier
from supmim_jax.objectives import OBJECTIVES
from supmim_jax.types import Batch, Features, Metrics, TrainState

INIT, STEPS = 0, 1  # folded into the seed's key: two streams that never meet


@dataclass(frozen=True)
class Program:
    """Training: `init(key) -> state`, `step(state, batch, frozen) -> (state, metrics)`.

    `state`, `batch` and `frozen` are abstract values (shapes, dtypes, shardings); `step` donates
    its state. `graph` turns parameters back into the objective: nnx.merge(graph, params, frozen).
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

    def split(key) -> tuple[nnx.GraphDef, Any, Any]:
        with nnx.use_eager_sharding(False):
            objective = OBJECTIVES[cfg.objective.name](cfg, rngs=nnx.Rngs(key))
            graph, params, frozen = nnx.split(objective, nnx.Param, Frozen)
        return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(frozen)

    def init(key) -> TrainState:
        _, params, _ = split(jax.random.fold_in(key, INIT))
        return TrainState(jnp.zeros((), jnp.int32), params, transform.init(params))

    graph, _, frozen = jax.eval_shape(split, jax.random.key(0))
    state = sharding.shard_like_params(jax.eval_shape(init, jax.random.key(0)), mesh)

    def step(state: TrainState, batch: Batch, frozen) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(cfg.seed), STEPS)
        key = jax.random.fold_in(key, state.step)

        def loss(params):
            return nnx.merge(graph, params, frozen).loss(batch, key)

        grads, metrics = jax.grad(loss, has_aux=True)(state.params)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": learning_rate(state.step),
        }
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), metrics

    layout = jax.tree.map(lambda x: x.sharding, state)
    return Program(
        init=jax.jit(init, out_shardings=layout),
        step=jax.jit(step, out_shardings=(layout, None), donate_argnums=0),
        state=state,
        batch=abstract_batch(cfg, cfg.batch_size, mesh),
        frozen=sharding.replicated(frozen, mesh),
        graph=graph,
    )


def abstract_batch(cfg: Config, batch_size: int, mesh: Mesh) -> Batch:
    """Shapes, dtypes and shardings of a global batch."""
    rows = NamedSharding(mesh, sharding.BATCH)
    size = cfg.data.image_size

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=rows)

    images = array(jnp.uint8, size, size, cfg.data.channels)
    return Batch((images,), array(jnp.int32), array(jnp.float32), array(jnp.int32))


@dataclass(frozen=True)
class Inference:
    """Evaluation: `features(params, images) -> Features`.

    The same program whatever the training objective: `params` (abstract) are `encoder` and `head`
    alone, and `images` (abstract) is a global batch of uint8 images.
    """

    features: Callable[[Any, jax.Array], Features]
    params: Any
    images: jax.ShapeDtypeStruct


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


def bind(inference: Inference, params: Any) -> BoundEncoder:
    """The encoder with the inference part of a train state's `params`."""
    return BoundEncoder(inference, {name: params[name] for name in inference.params})
