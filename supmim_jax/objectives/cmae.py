"""MAE with a smaller decoder, a contrastive and a position task (arXiv 2205.10546).

Not the method of the same acronym of arXiv 2207.13532. Of the paper only the abstract is available
to us. One mask for both views, losses summed over the views, weight 0.1, momentum 0.999 and
temperature 1 are those of the first author's later public code (SDMAE). Ours are the projector,
what the momentum branch sees (the same kept patches, with all their places), symmetric InfoNCE, and
`leak_free`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from supmim_jax.batch import Batch, Metrics
from supmim_jax.config import Config
from supmim_jax.models import Moving, freeze, masking
from supmim_jax.models.transformer import embedding, layer_norm, linear
from supmim_jax.models.vit import ViT, pixels
from supmim_jax.objectives import losses
from supmim_jax.objectives.mae import MAE


class Projector(nnx.Module):
    """Linear, LayerNorm, GELU, linear, in float32.

    MoCo v3 (arXiv 2104.02057) has BatchNorm in this place; LayerNorm keeps examples, and devices,
    apart.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, *, rngs: nnx.Rngs):
        dtype = jnp.dtype("float32")
        self.hidden = linear(inputs, hidden, dtype, rngs)
        self.norm = layer_norm(hidden, dtype, rngs)
        self.output = linear(hidden, outputs, dtype, rngs)

    def __call__(self, x_BxD) -> jax.Array:
        """float32 Bx(outputs)."""
        return self.output(jax.nn.gelu(self.norm(self.hidden(x_BxD))))


class CMAE(MAE):
    """L = sum over views (reconstruction + w_p position) + w_c contrastive.

    Position: from the encoder's output at a kept patch, where it was. With `leak_free` a share of
    them enters without its place and only these are asked for; without, a place can be read off
    the position embedding, which the residual stream carries to the output.
    """

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        super().__init__(cfg, rngs=rngs)
        position = self.cfg.position
        if position.weight:
            places = self.encoder.side**2
            self.locator = linear(cfg.model.width, places, jnp.dtype("float32"), rngs)
            if position.leak_free:
                self.place_embedding = embedding(rngs, cfg.model.width)
        contrastive = self.cfg.contrastive
        if contrastive.weight:
            sizes = contrastive.hidden, contrastive.dim
            self.projector = Projector(cfg.model.width, *sizes, rngs=rngs)
            self.predictor = Projector(contrastive.dim, *sizes, rngs=rngs)
            self.momentum = MomentumBranch(cfg)

    def loss(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        drop_key, mask_key = jax.random.split(key)
        cfg, weight = self.cfg, batch.weight
        views = [pixels(view) for view in batch.views]
        mask = self.mask(mask_key, batch.id)  # one for both views, as in SDMAE's code
        inputs = tuple(self.embed_kept(view, mask) for view in views)
        outputs = self.encoder.encode(inputs, batch.row_key(drop_key))

        errors = sum(
            mask.mean(self.target.loss(self.decoder(tokens, mask), self.target.patches(view, mask)))
            for view, tokens in zip(views, outputs, strict=True)
        )
        loss = reconstruction = losses.mean(errors, weight)
        terms = {"reconstruction": reconstruction}
        if cfg.position.weight:
            found = [self.position(tokens, mask) for tokens in outputs]
            position = losses.mean(sum(error for error, _ in found), weight)
            hits = sum(hit for _, hit in found) / len(found)
            loss += cfg.position.weight * position
            terms |= {"position": position, "position_accuracy": losses.mean(hits, weight)}
        if cfg.contrastive.weight:
            contrastive, accuracy = self.contrastive(outputs, views, mask, weight)
            loss += cfg.contrastive.weight * contrastive
            terms |= {"contrastive": contrastive, "contrastive_accuracy": accuracy}
        return loss, {"loss": loss, **terms}

    def embed_kept(self, view, mask: masking.Mask) -> jax.Array:
        """What the encoder sees of float images: BxKxD, and the tokens before the patches."""
        position = self.cfg.position
        if not (position.weight and position.leak_free):
            return self.encoder.embed(view, visible=mask)
        unplaced = self.asked(mask), self.place_embedding[...]
        return self.encoder.embed(view, visible=mask, unplaced=unplaced)

    def asked(self, mask: masking.Mask) -> int:
        """How many kept patches are asked for their places: the first, in their random order."""
        return self.cfg.asked_places(mask.keep.shape[1])

    def position(self, tokens_BxNxD, mask: masking.Mask) -> tuple[jax.Array, jax.Array]:
        """Cross-entropy of the places and the share of right ones, means over tokens: B each."""
        count, prefix = self.asked(mask), self.encoder.prefix
        # Kept patches are in random order, so that the first of them are a random choice.
        logits = self.locator(tokens_BxNxD[:, prefix : prefix + count].astype(jnp.float32))
        places = mask.keep[:, :count]
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), places[..., None], axis=-1)
        hits = (logits.argmax(-1) == places).astype(jnp.float32)
        return -log_p.mean((1, 2)), hits.mean(1)

    @jax.named_scope("contrastive")
    def contrastive(self, outputs, views, mask: masking.Mask, weight_B) -> tuple:
        """Symmetric InfoNCE of two views over the global batch, and its accuracy; scalars."""
        cfg = self.cfg.contrastive
        # Before the keys are made, so that in the first step they come from this very encoder.
        self.momentum.follow(self.encoder, self.projector, cfg.momentum)
        keys = self.momentum(views, mask)
        errors, accuracy = 0.0, 0.0
        # Each view looks for the key of the other view: its own would be too easy to find.
        for tokens, key in zip(outputs, reversed(keys), strict=True):
            query = self.predictor(self.projector(self.encoder.pool(tokens)))
            error, hit = losses.info_nce(query, key, cfg.temperature, weight_B)
            errors += losses.mean(error, weight_B)
            accuracy += losses.mean(hit.astype(jnp.float32), weight_B) / len(outputs)
        return errors, accuracy


class MomentumBranch(nnx.Module):
    """A slow copy of encoder and projector that gives the keys; no gradient reaches it."""

    def __init__(self, cfg: Config):
        contrastive = cfg.objective.contrastive
        sizes = contrastive.hidden, contrastive.dim
        self.encoder = ViT(cfg.model, cfg.data, rngs=nnx.Rngs(0))
        self.projector = Projector(cfg.model.width, *sizes, rngs=nnx.Rngs(0))
        freeze(self, Moving)
        self.steps = Moving(jnp.zeros((), jnp.int32))

    def __call__(self, views, mask: masking.Mask) -> list[jax.Array]:
        """Keys of float images, float32 BxD for each view."""
        # With all places, also under `leak_free`: the position task is not asked of keys.
        inputs = tuple(self.encoder.embed(view, visible=mask) for view in views)
        outputs = self.encoder.encode(inputs)
        return [jax.lax.stop_gradient(self.projector(self.encoder.pool(x))) for x in outputs]

    def follow(self, encoder: ViT, projector: Projector, momentum: float) -> None:
        """slow = momentum * slow + (1 - momentum) * fast, MoCo's update (arXiv 1911.05722).

        The first step copies, whatever the run has started from.
        """
        keep = jnp.where(self.steps[...] == 0, 0.0, momentum)
        for slow, fast in ((self.encoder, encoder), (self.projector, projector)):
            old, new = (
                nnx.to_pure_dict(nnx.state(x, kind))
                for x, kind in ((slow, Moving), (fast, nnx.Param))
            )
            nnx.update(slow, jax.tree.map(lambda s, f: keep * s + (1.0 - keep) * f, old, new))
        self.steps[...] += 1
