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
