"""How much to mask, always the same or drawn in every step, and smoothed labels of the tokens.

  python -m supmim_jax.study --study configs/studies/emoji_masks.py --out runs/masks --jobs 2

Hardware: 2 CPU cores; a cell took 828 to 2613 s of one, beside other work. Judged on the
validation designer. Results: docs/study.md.
"""

from configs.studies.emoji import compared, supmim
from supmim_jax.study import Study


def study() -> Study:
    runs = {
        "half": supmim(),
        "0.3": supmim(mask_ratio=0.3),
        "0.75": supmim(mask_ratio=0.75),
        "drawn": supmim(mask_ratio=0.55, mask_ratio_std=0.25),  # MAGE's
        "smoothed": supmim(token_smoothing=0.1),
    }
    return compared("Mask ratios, and label smoothing of the tokens.", runs, "validation")
