"""Losses as pure functions of float32 logits; each gives one value per example."""

import jax
import jax.numpy as jnp


def smoothed_one_hot(labels_B, classes: int, smoothing: float) -> jax.Array:
    """Targets BxV: (1 - smoothing) on the label, the rest spread evenly over all classes."""
    return jax.nn.one_hot(labels_B, classes) * (1.0 - smoothing) + smoothing / classes


def softmax_cross_entropy(logits_BxV, targets_BxV) -> jax.Array:
    """Cross-entropy of soft targets, B."""
    return -(targets_BxV * jax.nn.log_softmax(logits_BxV)).sum(-1)


def sigmoid_cross_entropy(logits_BxV, targets_BxV) -> jax.Array:
    """Binary cross-entropy summed over classes, B.

    The sum is in nats per image, like softmax's, so that it balances with the masked-token term;
    timm's and DeiT-III's codes take the mean over classes, a thousandth on ImageNet.
    """
    log_yes, log_no = jax.nn.log_sigmoid(logits_BxV), jax.nn.log_sigmoid(-logits_BxV)
    return -(targets_BxV * log_yes + (1.0 - targets_BxV) * log_no).sum(-1)


def masked_token_cross_entropy(logits_BxLxV, ids_BxL, masked_BxL) -> jax.Array:
    """Cross-entropy of the token ids, mean over each image's masked patches, B."""
    log_p = jax.nn.log_softmax(logits_BxLxV)
    nll = -jnp.take_along_axis(log_p, ids_BxL[..., None], axis=-1)[..., 0]
    return (nll * masked_BxL).sum(-1) / masked_BxL.sum(-1)


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


def perplexity(share_V) -> jax.Array:
    """exp(entropy) of shares: the number of codes, if all were used alike."""
    share = share_V / share_V.sum()
    return jnp.exp(-(share * jnp.log(jnp.maximum(share, 1e-30))).sum())
