"""Where in an image an encoder sees something: heat maps and their boxes, for ContrastiveCrop."""

import jax
import jax.numpy as jnp
import numpy as np

ITERATIONS = 32  # of the power method; each costs two products of the tokens with a vector


def heat_map(tokens_BxHxWxD) -> jax.Array:
    """Each token's part in the image's first principal component, float32 BxHxW.

    ContrastiveCrop (arXiv 2202.03278, section 3.2) sums the channels of the last convolution. A
    ViT's tokens come out of a LayerNorm, so that their channels sum to next to nothing; what sets
    an object apart from its ground is the direction in which the tokens of an image differ most.
    Of its two ends the one nearer the middle of the image is the warm one.
    """
    b, h, w, d = tokens_BxHxWxD.shape
    x = tokens_BxHxWxD.astype(jnp.float32).reshape(b, h * w, d)
    x = x - x.mean(1, keepdims=True)
    inner = np.zeros((h, w), np.float32)
    inner[h // 4 : h - h // 4, w // 4 : w - w // 4] = 1.0
    start = jnp.asarray(inner - inner.mean()).reshape(-1)  # warm inside, cold outside

    def turn(u_BxL, _):
        u = jnp.einsum("bld,bkd,bk->bl", x, x, u_BxL, optimize=[(1, 2), (0, 1)])
        return u / jnp.maximum(jnp.linalg.norm(u, axis=1, keepdims=True), 1e-12), None

    u, _ = jax.lax.scan(turn, jnp.broadcast_to(start, (b, h * w)), length=ITERATIONS)
    sign = jnp.where((u * start).sum(1, keepdims=True) < 0, -1.0, 1.0)
    return (u * sign).reshape(b, h, w)


def bounds(heat_BxHxW, size: int, threshold: float) -> jax.Array:
    """Boxes around all that is warm: uint8 Bx4, top, left, bottom, right in 255ths of the image.

    The map is enlarged to `size` x `size` and scaled to [0, 1], then cut at the threshold (arXiv
    2202.03278, section 3.2). The box of a map without differences is the whole image.
    """
    x = jax.image.resize(heat_BxHxW, (heat_BxHxW.shape[0], size, size), "linear")
    low, high = x.min((1, 2), keepdims=True), x.max((1, 2), keepdims=True)
    warm = (x - low) > threshold * (high - low)
    sides = []
    for axis in (2, 1):
        line = warm.any(axis)
        sides += [line.argmax(1), size - line[:, ::-1].argmax(1)]
    top, bottom, left, right = sides
    first = jnp.floor(jnp.stack([top, left], 1) * (255.0 / size))
    last = jnp.ceil(jnp.stack([bottom, right], 1) * (255.0 / size))
    flat = (high - low)[:, 0] <= 1e-6
    whole = jnp.array([0.0, 0.0, 255.0, 255.0])
    return jnp.where(flat, whole, jnp.concatenate([first, last], 1)).astype(jnp.uint8)
