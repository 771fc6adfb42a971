"""An image tokenizer for emoji_designs: 256 codes, a token for each 4x4 patch.

  python -m supmim_jax.train --config configs/vqgan_emoji.py --workdir runs/vqgan_emoji

Hardware: 2 CPU cores, 402 s on a Xeon. configs/studies/emoji_targets.py trains SupMIM with its
tokens. All values are our choices. Measured: 20.5 dB PSNR on the validation designer, all codes in
use, perplexity 223.
"""

from configs import emoji_supervised, vqgan_debug
from supmim_jax import config as c

TOKENIZER = c.changed(vqgan_debug.TOKENIZER, filters=16, codes=256)


def experiment() -> c.Config:
    return c.changed(
        emoji_supervised.experiment(),
        objective=c.VQGANObjectiveConfig(tokenizer=TOKENIZER, entropy_weight=0.01),
        optim=c.OptimConfig(lr=3e-3, weight_decay=0.0, b2=0.99, warmup_epochs=1),
    )
