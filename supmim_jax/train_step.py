"""The one train step, as jitted functions and abstract values.

`TrainStep.build` touches neither data nor device memory: `train` runs its step, `rehearse` compiles
it for hardware that isn't there. With config.optim.accumulate a step sums the gradients of several
micro-batches: the gradient of the large batch, with the memory of a small one. Mixing, and whatever
is drawn by an example's id (crops, masks), are the same as in the large batch. Only DropPath is
drawn anew for each micro-batch.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from supmim_jax import optim, sharding
from supmim_jax.batch import Batch, Metrics, TrainState
from supmim_jax.config import Config
from supmim_jax.models import Frozen, Moving
from supmim_jax.objectives import OBJECTIVES

INIT, STEPS = 0, 1  # folded into the seed's key: two streams that never meet


@dataclass(frozen=True)
class TrainStep:
    """Training: `init(key) -> state`, `step(state, batch, frozen) -> (state, metrics)`.

    `state`, `batch` and `frozen` are abstract values (shapes, dtypes, shardings); `step` donates
    its state. nnx.merge(graph, params, moving, frozen) is the objective again.
    """

    mesh: Mesh
    init: Callable[[jax.Array], TrainState]
    step: Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]
    state: TrainState
    batch: Batch
    frozen: Any
    graph: nnx.GraphDef

    @classmethod
    def build(cls, cfg: Config, mesh: Mesh) -> "TrainStep":
        """The step of `cfg` on its `run_mesh`.

        Raises:
          ConfigError: the mesh does not divide a parameter.
        """
        transform = optim.make(cfg)
        learning_rate = optim.schedule(cfg)

        def begin(key) -> tuple[TrainState, Any, nnx.GraphDef]:
            rngs = nnx.Rngs(jax.random.fold_in(key, INIT))
            with nnx.use_eager_sharding(False):
                model = OBJECTIVES[cfg.objective.name](cfg, rngs=rngs)
                graph, params, moving, frozen = parts(model)
            ema = jax.tree.map(jnp.copy, params) if cfg.optim.ema else {}
            opt_state = transform.init(params)
            state = TrainState(jnp.zeros((), jnp.int32), params, moving, opt_state, ema)
            return state, frozen, graph

        abstract, frozen, graph = jax.eval_shape(begin, jax.random.key(0))
        state = sharding.shard_like_params(abstract, mesh)
        frozen_arrays = sharding.replicated(frozen, mesh)
        layout = jax.tree.map(lambda x: x.sharding, state)

        def step(state: TrainState, batch: Batch, frozen) -> tuple[TrainState, Metrics]:
            # Of seed and step alone: a resumed run draws what an uninterrupted one does.
            key = jax.random.fold_in(jax.random.key(cfg.seed), STEPS)
            key = jax.random.fold_in(key, state.step)

            def loss(params, batch: Batch):
                model = nnx.merge(graph, params, state.moving, frozen)
                value, metrics = model.loss(batch, key)
                return value, (metrics, *parts(model)[1:3])

            def of_micro_batch(batch: Batch):
                grads, (metrics, _, _) = jax.grad(loss, has_aux=True)(state.params, batch)
                # Sharded as parameters are, or the sum would lie whole on every device.
                return jax.lax.with_sharding_constraint(grads, layout.params), metrics

            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for sharding.by_rows
                if cfg.optim.accumulate > 1:
                    params, moving = state.params, state.moving
                    grads, metrics = accumulate(of_micro_batch, batch, cfg.optim.accumulate)
                else:
                    # A loss may overwrite variables; the update is then added to what it left.
                    grads, aux = jax.grad(loss, has_aux=True)(state.params, batch)
                    metrics, params, moving = aux
            with jax.named_scope("optimizer"):
                updates, opt_state = transform.update(grads, state.opt_state, state.params)
                params, ema = optax.apply_updates(params, updates), {}
                if state.ema:
                    ema = optax.incremental_update(params, state.ema, 1 - cfg.optim.ema)
                norm = optax.tree.norm(grads)
            metrics |= {"grad_norm": norm, "learning_rate": learning_rate(state.step)}
            return TrainState(state.step + 1, params, moving, opt_state, ema), metrics

        return cls(
            mesh=mesh,
            init=jax.jit(lambda key: begin(key)[0], out_shardings=layout),
            step=jax.jit(step, out_shardings=(layout, None), donate_argnums=0),
            state=state,
            batch=abstract_batch(cfg, cfg.batch_size, mesh),
            frozen=frozen_arrays,
            graph=graph,
        )


def accumulate(
    of_batch: Callable[[Batch], tuple[Any, dict]], batch: Batch, parts: int
) -> tuple[Any, dict]:
    """Means over examples of what `of_batch` gives, gradients and metrics, as of the whole batch.

    Each is taken to be a mean over the examples that count (weight 1).
    """
    shapes = jax.eval_shape(of_batch, jax.tree.map(lambda x: x[0], micro_batches(batch, parts)))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(total, micro: Batch):
        count = micro.weight.sum()
        return jax.tree.map(lambda t, x: t + count * x, total, of_batch(micro)), None

    total, _ = jax.lax.scan(add, zeros, micro_batches(batch, parts))
    return jax.tree.map(lambda x: x / jnp.maximum(batch.weight.sum(), 1.0), total)


def micro_batches(batch: Batch, parts: int) -> Batch:
    """Micro-batches along a new leading axis, each with its number in `micro`.

    Of every `parts` neighbouring rows each micro-batch gets one, so that no row leaves its device.
    In the second half of the batch they are dealt in reverse: the mirror of a row in its
    micro-batch, which it is mixed with, is then its mirror in the batch.
    """

    def deal(x):
        rows = x.reshape(-1, parts, *x.shape[1:])
        at = jnp.arange(len(rows)).reshape(-1, *[1] * x.ndim)
        rows = jnp.where(at < len(rows) // 2, rows, rows[:, ::-1])
        return sharding.rows_of_parts(jnp.swapaxes(rows, 0, 1))

    return dataclasses.replace(jax.tree.map(deal, batch), micro=jnp.arange(parts))


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
        (images,) * cfg.objective.crops,
        array(jnp.int32),
        array(jnp.float32),
        array(jnp.int32),
        target=images if cfg.needs_target else None,
        tokens=array(jnp.uint16, (size // cfg.model.patch) ** 2) if cfg.tokens.cache else None,
        masks=array(jnp.int32, size, size) if cfg.needs_masks else None,
    )
