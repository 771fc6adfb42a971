"""Trains an image tokenizer: VQGAN (arXiv 2012.09841) as MaskGIT (arXiv 2202.04200) uses it.

The terms are those of the papers, with the weights of MaskGIT's published config in
configs/vqgan_imagenet256.py. Our choices: dead codes are revived, the discriminator is a plain
patch discriminator, and the perceptual distance is of an encoder of ours in place of VGG features.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from supmim_jax.batch import Batch, Metrics
from supmim_jax.config import Config
from supmim_jax.models import Moving, freeze, kmeans
from supmim_jax.models.vit import ViT, pixels
from supmim_jax.models.vqgan import Discriminator, nearest, squared_distances
from supmim_jax.objectives import losses


class VQGANTraining(nnx.Module):
    """L = reconstruction + codebook + commitment + entropy (+ perceptual) (+ adversarial).

    The discriminator's loss is part of the same sum: neither side's gradient reaches the other's
    parameters, so one optimizer serves both.
    """

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg.objective
        patch = self.cfg.tokenizer.downsampling
        self.tokenizer = kmeans.make(self.cfg.tokenizer, patch, cfg.data, rngs)
        codes = self.cfg.tokenizer.codes
        self.usage = Moving(jnp.full(codes, 1.0 / codes, jnp.float32))  # running share of each code
        if self.cfg.perceptual.weight:
            self.perceptual = ViT(cfg.model, cfg.data, rngs=rngs)
            freeze(self.perceptual)
        if self.cfg.adversarial.weight:
            self.discriminator = Discriminator(self.cfg.adversarial, cfg.data.channels, rngs=rngs)
            self.steps = Moving(jnp.zeros((), jnp.int32))
            self.start = round(self.cfg.adversarial.start * cfg.total_steps)

    def loss(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        cfg, weight, fixed = self.cfg, batch.weight, jax.lax.stop_gradient
        images = pixels(batch.views[0])
        latents = self.tokenizer.latents(images)
        flat = latents.reshape(latents.shape[0], -1, latents.shape[-1])
        codes = self.tokenizer.codebook[...]
        ids = nearest(flat, codes)
        quantised = codes[ids].reshape(latents.shape)
        # The decoder sees codes; its gradient passes to the latents as if they had been seen.
        images_out = self.tokenizer.render(latents + fixed(quantised - latents))

        def average(values) -> jax.Array:
            return losses.mean(values.mean(tuple(range(1, values.ndim))), weight)

        l2 = average((images_out - images) ** 2)
        terms = {
            "l1": cfg.l1_weight * average(jnp.abs(images_out - images)),
            "l2": cfg.l2_weight * l2,
            "codebook": cfg.codebook_weight * average((quantised - fixed(latents)) ** 2),
            "commitment": cfg.commitment_weight * average((latents - fixed(quantised)) ** 2),
        }
        if cfg.entropy_weight:
            distances = squared_distances(flat, codes)
            entropy = losses.assignment_entropy(distances, cfg.entropy_temperature, weight)
            terms["entropy"] = cfg.entropy_weight * entropy
        if cfg.perceptual.weight:
            distance = average((self._features(images_out) - self._features(images)) ** 2)
            terms["perceptual"] = cfg.perceptual.weight * distance
        if cfg.adversarial.weight:
            terms |= self._adversarial(images, images_out, average)
        loss = sum(terms.values())
        share = losses.code_shares(ids, len(codes), weight)
        self._revive(flat, share, key)
        usage = self.usage[...] / self.usage[...].sum()
        return loss, {
            "loss": loss,
            **terms,
            "psnr": -10.0 * jnp.log10(jnp.maximum(l2 / 4.0, 1e-10)),  # images span [-1, 1]
            "code_usage": (share > 0).mean(),
            "perplexity": jnp.exp(-(usage * jnp.log(jnp.maximum(usage, 1e-30))).sum()),
        }

    def _features(self, images) -> jax.Array:
        """Unit-length patch tokens of the frozen encoder, float32 BxNxD."""
        (tokens,) = self.perceptual.encode((self.perceptual.embed(images),))
        tokens = tokens.astype(jnp.float32)
        return tokens / jnp.linalg.norm(tokens, axis=-1, keepdims=True)

    def _adversarial(self, images, images_out, average) -> Metrics:
        """Non-saturating losses of both sides, and R1 on real images."""
        cfg, fixed = self.cfg.adversarial, jax.lax.stop_gradient
        graph, weights = nnx.split(self.discriminator)
        judge = nnx.merge(graph, fixed(weights))
        acts = self.steps[...] >= self.start
        self.steps[...] += 1
        fool = average(jax.nn.softplus(-judge(images_out)))
        real = average(jax.nn.softplus(-self.discriminator(images)))
        fake = average(jax.nn.softplus(self.discriminator(fixed(images_out))))
        slope = jax.grad(lambda x: self.discriminator(x).mean((1, 2)).sum())(images)
        penalty = average((slope**2).sum((1, 2, 3))[:, None])
        return {
            "generator": jnp.where(acts, cfg.weight, 0.0) * fool,
            "discriminator": real + fake,
            "r1": 0.5 * cfg.r1_weight * penalty,
        }

    def _revive(self, latents_BxLxD, share_V, key) -> None:
        """Follows how often codes are used, and moves dead ones onto latents of this batch."""
        codebook, decay = self.tokenizer.codebook, self.cfg.usage_decay
        codes = codebook[...].shape[0]
        usage = decay * self.usage[...] + (1.0 - decay) * share_V
        dead = usage < self.cfg.revive_below / codes
        latents = jax.lax.stop_gradient(latents_BxLxD).reshape(-1, latents_BxLxD.shape[-1])
        chosen = latents[jax.random.randint(key, (codes,), 0, len(latents))]
        codebook[...] = jnp.where(dead[:, None], chosen, codebook[...])
        self.usage[...] = jnp.where(dead, 1.0 / codes, usage)
