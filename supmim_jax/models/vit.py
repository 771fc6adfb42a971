"""The ViT encoder (arXiv 2010.11929) and the classifier that is used at inference.

Global average pooling is the default, so that 224 px in patches of 14 are exactly 256 tokens, a
16x16 grid: one for each token of MaskGIT's VQGAN.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from supmim_jax.batch import Features
from supmim_jax.config import DataConfig, ViTConfig
from supmim_jax.models.masking import Mask
from supmim_jax.models.transformer import Transformer, embedding, layer_norm, linear, sincos2d


def pixels(images_uint8) -> jax.Array:
    """float32 images in [-1, 1]."""
    return images_uint8.astype(jnp.float32) / 127.5 - 1.0


def patchify(images_BxHxWxC, patch: int) -> jax.Array:
    """Non-overlapping patches in row order, BxLx(patch*patch*C), each in (row, column, C) order."""
    b, h, w, c = images_BxHxWxC.shape
    x = images_BxHxWxC.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(patches_BxLxP, patch: int, side: int) -> jax.Array:
    """Inverse of `patchify` for square grids of `side` patches."""
    b, _, p = patches_BxLxP.shape
    x = patches_BxLxP.reshape(b, side, side, patch, patch, p // patch**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, side * patch, side * patch, -1)


class ViT(nnx.Module):
    """Images, or their kept patches, to normalised tokens.

    `embed` and `encode` are apart so that several inputs (the image, its masked twin) can be
    packed into one pass: every matmul then runs once over all tokens.
    """

    def __init__(self, cfg: ViTConfig, data: DataConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.side = data.image_size // cfg.patch
        self.prefix = cfg.prefix  # the CLS token, if there is one, then the registers
        dtype = jnp.dtype(cfg.dtype)
        self.patches = linear(cfg.patch**2 * data.channels, cfg.width, dtype, rngs)
        if cfg.positions == "learned":
            self.positions = embedding(rngs, self.side**2, cfg.width)
        if cfg.pooling == "cls":
            self.cls = nnx.Param(jnp.zeros((cfg.width,), jnp.float32))
        if cfg.registers:
            self.registers = embedding(rngs, cfg.registers, cfg.width)
        self.transformer = Transformer(
            cfg,
            cfg.remat,
            rngs,
            (cfg.drop_path if cfg.drop_path_form == "constant" else 0.0, cfg.drop_path),
            layer_scale=cfg.layer_scale,
            gelu=cfg.gelu,
            dtype=dtype,
            dropout=cfg.dropout,
        )
        self.norm = layer_norm(cfg.width, dtype, rngs)

    @jax.named_scope("patch_embedding")
    def embed(
        self, images_BxHxWxC, visible: Mask | None = None, masked=None, unplaced=None
    ) -> jax.Array:
        """Patch embeddings with positions, BxNxD.

        Args:
          images_BxHxWxC: float images as from `pixels`.
          visible: only the kept patches of this mask enter (MAE's form); they are gathered
            before the embedding, so masked ones cost nothing.
          masked: (Mask, mask embedding D): masked patches enter as the mask embedding at their
            positions (BEiT's and SimMIM's form).
          unplaced: with `visible`, (n, embedding D): the first n kept patches enter with this
            embedding in place of their position, so that nothing tells where they are.
        """
        x = patchify(images_BxHxWxC, self.cfg.patch)
        if self.cfg.positions == "learned":
            positions = self.positions[...][None]
        else:
            grid = self.cfg.position_grid
            positions = jnp.asarray(sincos2d(self.side, self.side, self.cfg.width, grid))[None]
        if visible is not None:
            x = jnp.take_along_axis(x, visible.keep[..., None], axis=1)
            positions = positions[0][visible.keep]
        if unplaced is not None:
            count, nowhere = unplaced
            positions = positions.at[:, :count].set(nowhere)
        x = self.patches(x)
        if masked is not None:
            mask, embedding = masked
            x = jnp.where(mask.masked[..., None], embedding.astype(x.dtype), x)
        # After the mask embedding: a masked patch has no content, but it keeps its place.
        x = x + positions.astype(x.dtype)
        if self.prefix:
            first = [self.cls[...][None]] if self.cfg.pooling == "cls" else []
            first += [self.registers[...]] if self.cfg.registers else []
            first = jnp.concatenate(first).astype(x.dtype)
            first = jnp.broadcast_to(first, (x.shape[0], *first.shape))
            x = jnp.concatenate([first, x], axis=1)
        return x

    @jax.named_scope("encoder")
    def encode(self, inputs: tuple[jax.Array, ...], key=None) -> tuple[jax.Array, ...]:
        """Normalised tokens of each BxNxD input, all in one pass; attention stays within one."""
        segments = tuple(x.shape[1] for x in inputs)
        # Along the tokens, not the rows: each device then holds an image together with its twin.
        x = self.norm(self.transformer(jnp.concatenate(inputs, axis=1), segments, key))
        ends = [sum(segments[: i + 1]) for i in range(len(segments) - 1)]
        return tuple(jnp.split(x, ends, axis=1))

    def features(self, images, key=None) -> Features:
        """Features of float BxHxWxC images; `key` switches DropPath and dropout on."""
        (tokens,) = self.encode((self.embed(images),), key)
        grid = tokens[:, self.prefix :].astype(jnp.float32)
        return Features(self.pool(tokens), grid.reshape(grid.shape[0], self.side, self.side, -1))

    def pool(self, tokens_BxNxD) -> jax.Array:
        """The image's embedding, float32 BxD: CLS token or mean over patches."""
        x = tokens_BxNxD.astype(jnp.float32)  # a mean in bfloat16 is coarse for kNN
        return x[:, 0] if self.cfg.pooling == "cls" else x[:, self.prefix :].mean(axis=1)


class Backbone(nnx.Module):
    """The encoder alone: all that there is at inference where no labels are learned."""

    def __init__(self, cfg: ViTConfig, data: DataConfig, *, rngs: nnx.Rngs):
        self.encoder = ViT(cfg, data, rngs=rngs)

    def features(self, images) -> Features:
        """Features of uint8 BxHxWxC images."""
        return self.encoder.features(pixels(images))


class Classifier(nnx.Module):
    """Encoder and linear head: all that there is at inference where labels are learned."""

    def __init__(self, cfg: ViTConfig, data: DataConfig, *, rngs: nnx.Rngs):
        self.encoder = ViT(cfg, data, rngs=rngs)
        zeros = nnx.initializers.zeros  # as in AugReg's code: the first loss is log(classes)
        self.head = linear(cfg.width, data.num_classes, jnp.float32, rngs, zeros)

    def features(self, images) -> Features:
        """Features of uint8 BxHxWxC images."""
        features = self.encoder.features(pixels(images))
        return features._replace(logits=self.head(features.pooled))
