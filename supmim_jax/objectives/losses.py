"""Losses as pure functions, in float32."""

import jax
import jax.numpy as jnp
import optax

from supmim_jax.sharding import everywhere


def sigmoid_cross_entropy(logits_BxV, targets_BxV) -> jax.Array:
    """Binary cross-entropy summed over classes, B.

    The sum is in nats per image, like softmax's, so that it balances with the masked-token term.
    """
    return optax.sigmoid_binary_cross_entropy(logits_BxV, targets_BxV).sum(-1)


def token_cross_entropy(logits_BxMxV, ids_BxM, smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy of each token's id, float32 BxM, of logits in any dtype.

    `smoothing` is the share of the target that all ids have alike (arXiv 1512.00567, section 7).
    In forms that XLA fuses, forward and backward: what it writes to memory of the logits' size is
    in their own dtype. A gather of the ids' logits, or log_softmax, would leave float32.
    """
    logits = logits_BxMxV.astype(jnp.float32)
    own = ids_BxM[..., None] == jnp.arange(logits.shape[-1])
    expected = jnp.where(own, logits, 0.0).sum(-1)
    if smoothing:
        expected = (1.0 - smoothing) * expected + smoothing * logits.mean(-1)
    return jax.nn.logsumexp(logits, axis=-1) - expected


def info_nce(queries_BxD, keys_BxD, temperature: float, weight_B) -> tuple[jax.Array, jax.Array]:
    """Each query's loss in finding its key among those of the whole global batch.

    -log(exp(q_i.k_i / t) / sum_j exp(q_i.k_j / t)) of unit vectors (arXiv 1807.03748; in the form
    of MoCo v3, arXiv 2104.02057, without its factor 2t). Keys of weight 0 are no negatives.

    Returns:
      float32 B, and bool B: whether its own key is the nearest.
    """
    queries, keys = _unit(queries_BxD), everywhere(_unit(keys_BxD))
    logits = jnp.matmul(queries, keys.T, precision=jax.lax.Precision.HIGHEST) / temperature
    logits = jnp.where(everywhere(weight_B) > 0, logits, -jnp.inf)
    own = jnp.arange(len(logits))
    log_p = jax.nn.log_softmax(logits)
    return -jnp.where(weight_B > 0, log_p[own, own], 0.0), logits.argmax(-1) == own


def _unit(x_BxD) -> jax.Array:
    x = x_BxD.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum((x**2).sum(-1, keepdims=True), 1e-24))


def mean(values_B, weight_B) -> jax.Array:
    """Mean over the examples that count (weight 1, not padding)."""
    return (values_B * weight_B).sum() / jnp.maximum(weight_B.sum(), 1.0)


def assignment_entropy(distances_BxLxV, temperature: float, weight_B) -> jax.Array:
    """Entropy of each soft assignment to codes, less that of the average assignment; a scalar.

    Low when every latent is sure of its code and all codes are used alike: the entropy loss of
    MaskGIT's quantiser, with softmax(-distance / temperature) as the assignment.
    """
    log_p = jax.nn.log_softmax(-distances_BxLxV / temperature)
    p = jnp.exp(log_p)
    each = mean(-(p * log_p).sum(-1).mean(-1), weight_B)
    average_V = jax.vmap(lambda column: mean(column, weight_B), 1)(p.mean(1))
    return each + (average_V * jnp.log(average_V + 1e-9)).sum()


def code_shares(ids_BxL, codes: int, weight_B) -> jax.Array:
    """Share of each code among the ids of the examples that count, float32 V."""
    weights = jnp.broadcast_to(weight_B[:, None], ids_BxL.shape)
    counts = jnp.zeros(codes).at[ids_BxL.reshape(-1)].add(weights.reshape(-1))
    return counts / jnp.maximum(counts.sum(), 1.0)
