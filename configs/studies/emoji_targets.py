"""What masked patches are predicted as: codes of luminance, colour or a VQGAN, or their pixels.

  python -m supmim_jax.train --config configs/vqgan_emoji.py --workdir runs/vqgan_emoji
  python -m supmim_jax.study --study configs/studies/emoji_targets.py --out runs/targets --jobs 2

Hardware: 2 CPU cores. Judged on the validation designer. Results: docs/study.md.
"""

from configs import vqgan_emoji
from configs.studies.emoji import COLOUR, SUPMIM, compared, supmim
from supmim_jax import config as c
from supmim_jax.study import Study


def study() -> Study:
    runs = {
        "luminance": SUPMIM,
        "colour": COLOUR,
        "pixels": supmim(target=c.PixelsConfig()),
        "vqgan": supmim(target=c.changed(vqgan_emoji.TOKENIZER, path="runs/vqgan_emoji")),
    }
    return compared("Targets of the masked patches.", runs, "validation")
