"""The decoder's depth and the weight of its loss.

  python -m supmim_jax.study --study configs/studies/emoji_decoder.py --out runs/decoder --jobs 2

Hardware: 2 CPU cores. Judged on the validation designer. Results: docs/study.md.
"""

from configs.studies.emoji import compared, supmim
from supmim_jax.study import Study


def study() -> Study:
    runs = {"default": supmim()}  # depth 1, weight 1
    runs |= {f"depth {depth}": supmim(decoder={"depth": depth}) for depth in (2, 4)}
    runs |= {f"weight {weight}": supmim(mim_weight=weight) for weight in (0.5, 0.25)}
    return compared("Depth of the decoder, weight of its loss.", runs, "validation")
