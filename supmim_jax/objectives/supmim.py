"""SupMIM: supervised learning with masked image modelling on the side (arXiv 2312.00950)."""

import jax
import jax.numpy as jnp
from flax import nnx

from supmim_jax.batch import Batch, Metrics
from supmim_jax.config import Config
from supmim_jax.models import masking
from supmim_jax.models.decoder import Decoder
from supmim_jax.models.transformer import embedding
from supmim_jax.models.vit import Classifier, pixels
from supmim_jax.objectives import losses, supervised, targets

RATIO = 2**31  # folded into the masks' key: no id's number


class SupMIM(Classifier):
    """L = cross-entropy(head(encoder(x)), y) + w * masked-token cross-entropy.

    The same encoder sees the image and its masked twin; a shallow decoder predicts the discrete
    image tokens of the masked patches. Where the paper's text available to us is silent (what the
    encoder sees at masked places, mask ratio and form, decoder size, w), the config chooses.
    Mixup and CutMix touch the classified image only: the masked twin is the image before mixing.
    Its target is of the same crop before colour augmentation (see `targets`), so that tokens can be
    computed once and cached.
    """

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        super().__init__(cfg.model, cfg.data, rngs=rngs)
        self.cfg, self.classes = cfg.objective, cfg.data.num_classes
        supervised.start_head(self.cfg.classification, self.head)
        self.target = targets.Tokens(cfg) if cfg.has_tokens else targets.Pixels(cfg)
        visible = self.cfg.encoder_input == "visible"
        side, outputs = self.encoder.side, self.target.outputs
        self.decoder = Decoder(
            self.cfg.decoder, cfg.model, side, outputs, inserts_masked=visible, rngs=rngs
        )
        if not visible:
            self.mask_embedding = embedding(rngs, cfg.model.width)

    def loss(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        mix_key, drop_key, mask_key = jax.random.split(key, 3)
        encoder, cfg = self.encoder, self.cfg.classification
        images = pixels(batch.views[0])
        mixed, labels = supervised.mix(cfg, images, batch, self.classes, mix_key)
        mask = self.mask(mask_key, batch.id)

        # The twin is the image before mixing, because tokens belong to a single image.
        inputs = encoder.embed(mixed), self.embed_masked(images, mask)
        tokens, masked_tokens = encoder.encode(inputs, batch.row_key(drop_key))

        # The label is asked of the whole image alone, which is what inference will see.
        logits = self.head(encoder.pool(tokens))
        ce = supervised.classification_loss(cfg, logits, labels, batch.weight)

        target = self.target(batch, mask)
        predicted = self.decoder(masked_tokens, mask)
        # Masked patches alone count: the encoder has seen the others.
        mim = losses.mean(mask.mean(self.target.loss(predicted, target)), batch.weight)

        loss = ce + self.cfg.mim_weight * mim
        return loss, {
            "loss": loss,
            "ce": ce,
            "mim": mim,
            "accuracy": supervised.accuracy(logits, batch),
            **self.target.metrics(predicted, target, mask, batch.weight),
        }

    @jax.named_scope("masks")
    def mask(self, key: jax.Array, ids_B) -> masking.Mask:
        """The masks of the examples with these ids."""
        cfg, ratio = self.cfg, self.cfg.mask_ratio
        if cfg.mask_ratio_std:
            drawn = cfg.mask_ratio_std, cfg.mask_ratio_min, jax.random.fold_in(key, RATIO)
            ratio = masking.draw_ratio(cfg.mask_ratio, *drawn)
        return masking.sample(cfg.mask_form, ratio, self.encoder.side, key, ids_B)

    def embed_masked(self, images, mask: masking.Mask) -> jax.Array:
        """What the encoder sees of masked images: BxNxD, N = L (`masked`) or K (`visible`)."""
        if self.cfg.encoder_input == "visible":
            return self.encoder.embed(images, visible=mask)
        return self.encoder.embed(images, masked=(mask, self.mask_embedding[...]))

    def predict(self, images, mask: masking.Mask) -> jax.Array:
        """Predictions for every patch, float32 BxLx(outputs), from masked float images."""
        (tokens,) = self.encoder.encode((self.embed_masked(images, mask),))
        return self.decoder(tokens, mask, every_patch=True).astype(jnp.float32)
